"""From a request's messages to the conversation that a chat template reads.

Mirrors vLLM 0.32 `renderers/chat_utils.py` for text: a template that walks over the parts of a
message gets a list of parts, any other gets their texts joined by newlines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tinfer.api.schemas import Message
from tinfer.errors import InvalidRequest

# Part types that carry text, and the key it is under.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def conversation(messages: list[Message], template: str) -> list[dict[str, Any]]:
    """The messages as `template` expects them. Raises `InvalidRequest` for parts without text."""
    if not messages:
        raise InvalidRequest("at least one message is required", param="messages")
    as_parts = wants_parts(template)
    result = [_converted(m, i, as_parts) for i, m in enumerate(messages)]
    knows_developer = "'developer'" in template or '"developer"' in template
    if any(m.role == "developer" for m in messages) and not knows_developer:
        result = _developer_as_system(result)
    return result


def _converted(message: Message, index: int, as_parts: bool) -> dict[str, Any]:
    parts = list(texts(message, index))
    content: Any = "\n".join(parts)
    if as_parts and message.role != "tool":
        content = [{"type": "text", "text": text} for text in parts]
    result: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        result["name"] = message.name
    if message.role == "assistant":
        if message.tool_calls:
            result["tool_calls"] = [_tool_call(call, index) for call in message.tool_calls]
        reasoning = message.reasoning or message.reasoning_content
        if reasoning is not None:
            result["reasoning"] = result["reasoning_content"] = reasoning
    elif message.role == "tool" and message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def texts(message: Message, index: int) -> Iterator[str]:
    """What the message says, part by part. Raises `InvalidRequest` for other parts than text."""
    if message.content is None:
        return
    parts = [message.content] if isinstance(message.content, str) else message.content
    for position, part in enumerate(parts):
        if isinstance(part, str):
            yield part
            continue
        param = f"messages[{index}].content[{position}]"
        kind = part.get("type", "text" if "text" in part else None)
        if not isinstance(kind, str) or kind not in TEXT_PARTS:
            raise InvalidRequest("only text parts are supported", param=f"{param}.type")
        text = part.get(TEXT_PARTS[kind])
        if text is None:
            continue
        if not isinstance(text, str):
            raise InvalidRequest("the text of a part must be a string", param=param)
        yield text


def _tool_call(call: dict[str, Any], index: int) -> dict[str, Any]:
    """A past tool call with its arguments as an object, which is what templates read."""
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidRequest(
            "only tool calls of type function are supported", param=f"messages[{index}].tool_calls"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            # History cannot be changed any more: one malformed call must not end the conversation.
            arguments = None
    if not isinstance(arguments, dict):
        arguments = {}
    return {**call, "function": {**function, "arguments": arguments}}


def _developer_as_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developer messages as system ones, and all of those as one at the front when scattered."""
    converted = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    system = [m for m in converted if m["role"] == "system"]
    if len(system) == 1 and converted[0] is system[0]:
        return converted
    texts = [text for m in system if (text := _joined(m["content"]))]
    rest = [m for m in converted if m["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest]


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)


class _GenerationTag(jinja2.ext.Extension):
    """Parses `{% generation %}`, which some templates use to mark the model's own words."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


@lru_cache(maxsize=32)
def wants_parts(template: str) -> bool:
    """Whether a template loops over the content of a message, so that it expects a list of parts.

    A template that does not parse gets strings; the error shows when it is rendered.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    try:
        tree = environment.parse(template)
    except jinja2.TemplateError:
        return False
    names = {"content"}
    for node in tree.find_all(jinja2.nodes.Assign):
        if isinstance(node.target, jinja2.nodes.Name) and _is_content(node.node, names):
            names.add(node.target.name)
    for macro in tree.find_all(jinja2.nodes.Macro):
        names |= _content_parameters(macro, tree, names)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(jinja2.nodes.For))


def _content_parameters(
    macro: jinja2.nodes.Macro, tree: jinja2.nodes.Template, names: set[str]
) -> set[str]:
    """The parameters of a macro that are given the content of a message somewhere."""
    return {
        parameter.name
        for call in tree.find_all(jinja2.nodes.Call)
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name == macro.name
        for parameter, given in zip(macro.args, call.args, strict=False)
        if _is_content(given, names)
    }


def _is_content(node: jinja2.nodes.Node | None, names: set[str]) -> bool:
    if isinstance(node, jinja2.nodes.Filter | jinja2.nodes.Test):
        return _is_content(node.node, names)
    if isinstance(node, jinja2.nodes.Name):
        return node.name in names
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        if isinstance(node.arg, jinja2.nodes.Slice):
            return _is_content(node.node, names)
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return False
