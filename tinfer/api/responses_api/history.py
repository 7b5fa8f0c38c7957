"""From the items of a response's `input` to the messages of a chat.

Items are joined as in vLLM 0.32 `responses/utils.py`: what the model thought, said and called in
one turn is one message of the assistant.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from tinfer.api.messages import TEXT_PARTS
from tinfer.api.schemas import Message
from tinfer.errors import InvalidRequest

_THOUGHT_PARTS = {"reasoning_text": "text", "summary_text": "text"}
_UNFINISHED = ("in_progress", "incomplete")


class InputItem(Struct):
    """One item of `input`, a message where it has no type.

    A message has `role` and `content`, a `function_call` a `call_id`, a `name` and `arguments`, a
    `function_call_output` a `call_id` and an `output`, `reasoning` its text in `content`, or else
    in `summary`. Ids are of no use to a server that stores nothing.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


def messages_of(instructions: str | None, given: str | list[InputItem]) -> list[Message]:
    """The chat so far. Raises `InvalidRequest` with the path of what is missing or no text."""
    messages = [Message("system", instructions)] if instructions else []
    if isinstance(given, str):
        return [*messages, Message("user", given)]
    for index, item in enumerate(given):
        _add(messages, item, f"input[{index}]")
    return messages


def continues(given: str | list[InputItem]) -> bool:
    """Whether the model is to go on with its last message, which says that it was cut off."""
    if isinstance(given, str) or not given:
        return False
    last = given[-1]
    is_models = last.type == "reasoning" or (
        last.type in (None, "message") and last.role == "assistant"
    )
    return is_models and last.status in _UNFINISHED


def _add(messages: list[Message], item: InputItem, param: str) -> None:
    match item.type:
        case "function_call":
            _add_call(messages, item, param)
        case "function_call_output":
            said = _texts(_needed(item, "output", param), TEXT_PARTS, f"{param}.output")
            call_id = _needed(item, "call_id", param)
            messages.append(Message("tool", said, tool_call_id=call_id))
        case "reasoning":
            thought = "\n".join(_texts_of_thought(item, param))
            _assistant(messages, "reasoning").reasoning = thought
        case _:
            role = _needed(item, "role", param)
            said = _texts(_needed(item, "content", param), TEXT_PARTS, f"{param}.content")
            if role == "assistant":
                _assistant(messages, "content").content = said
            else:
                messages.append(Message(role, said))


def _add_call(messages: list[Message], item: InputItem, param: str) -> None:
    call = {
        "id": _needed(item, "call_id", param),
        "type": "function",
        "function": {
            "name": _needed(item, "name", param),
            "arguments": _needed(item, "arguments", param),
        },
    }
    if not messages or messages[-1].role != "assistant":
        messages.append(Message("assistant"))
    messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]


def _assistant(messages: list[Message], part: Literal["content", "reasoning"]) -> Message:
    """The last message if it is the assistant's and lacks this part, else a new one behind it."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or getattr(last, part) is not None:
        messages.append(last := Message("assistant"))
    return last


def _texts_of_thought(item: InputItem, param: str) -> list[str]:
    if item.encrypted_content:
        raise InvalidRequest("cannot be read here", param=f"{param}.encrypted_content")
    for name in ("content", "summary"):
        given = getattr(item, name)
        if given:
            said = _texts(given, _THOUGHT_PARTS, f"{param}.{name}")
            return [said] if isinstance(said, str) else list(map(str, said))
    return []


def _texts(
    content: str | list[dict[str, Any]], kinds: dict[str, str], param: str
) -> str | list[str | dict[str, Any]]:
    """The texts of a content, whose parts are of these kinds; each has its text under a key."""
    if isinstance(content, str):
        return content
    texts: list[str | dict[str, Any]] = []
    for position, part in enumerate(content):
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise InvalidRequest("only text is supported", param=f"{param}[{position}].type")
        text = part.get(kinds[kind])
        if not isinstance(text, str):
            raise InvalidRequest("must be a string", param=f"{param}[{position}].{kinds[kind]}")
        texts.append(text)
    return texts


def _needed(item: InputItem, name: str, param: str) -> Any:
    value = getattr(item, name)
    if value is None:
        raise InvalidRequest("is required", param=f"{param}.{name}")
    return value
