"""What a chat asks of tools, checked as vLLM 0.32 checks it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from tinfer.api.schemas import ChatRequest, NamedTool, Tool
from tinfer.errors import InvalidRequest

# Which kinds of `structured_outputs` vLLM refuses beside a tool that is named.
_NOT_BESIDE_A_NAME = ("json", "regex", "choice")


class ToolUse(Struct, frozen=True):
    """The tools of a chat, and which of them the model may or must call.

    Without `parallel` an answer has one call at most.
    """

    tools: list[Tool] | None = None
    choice: Literal["none", "auto", "required"] | NamedTool = "none"
    parallel: bool = True

    @property
    def is_named(self) -> bool:
        return isinstance(self.choice, NamedTool)


def tool_use(parsed: ChatRequest, has_parser: bool) -> ToolUse:
    """What the request says of tools. Raises `InvalidRequest`.

    Without `tool_choice` the model may call tools where there are some. Whatever lets it call any
    needs a server that has a parser for the calls.
    """
    tools, choice = parsed.tools, parsed.tool_choice
    if tools is not None and not tools:
        raise InvalidRequest("must not be empty; leave it out instead", param="tools")
    if choice is None:
        choice = "auto" if tools else "none"
    if choice != "none":
        if tools is None:
            raise InvalidRequest("needs tools", param="tool_choice")
        if isinstance(choice, NamedTool):
            _check_named(parsed, choice, tools)
        if not has_parser:
            raise InvalidRequest(_missing_parser(choice), param="tool_choice")
    return ToolUse(tools, choice, parsed.parallel_tool_calls is not False)


def _check_named(parsed: ChatRequest, choice: NamedTool, tools: list[Tool]) -> None:
    if all(tool.function.name != choice.function.name for tool in tools):
        raise InvalidRequest("names none of the tools", param="tool_choice")
    asked = parsed.structured_outputs
    if asked is not None and any(getattr(asked, kind) is not None for kind in _NOT_BESIDE_A_NAME):
        raise InvalidRequest("does not go with a named tool", param="structured_outputs")


def _missing_parser(choice: Literal["auto", "required"] | NamedTool | str) -> str:
    """In vLLM's words where they name its flags, which are the same here."""
    if choice == "auto":
        return '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'
    shown = f'function "{choice.function.name}"' if isinstance(choice, NamedTool) else f'"{choice}"'
    return f"tool_choice={shown} requires --enable-auto-tool-choice and --tool-call-parser"


def for_template(tool: Tool) -> dict[str, Any]:
    """A tool as templates of vLLM see it: nulls stay, but for the two rarest fields."""
    function = msgspec.structs.asdict(tool.function)
    if function["defer_loading"] is None:
        function["defer_loading"] = tool.defer_loading
    for rare in ("strict", "defer_loading"):
        if function[rare] is None:
            del function[rare]
    shown: dict[str, Any] = {"type": tool.type, "function": function}
    if tool.defer_loading is not None:
        shown["defer_loading"] = tool.defer_loading
    return shown
