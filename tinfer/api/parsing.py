"""What finds tool calls and reasoning in an answer, as the API sees it.

vLLM's own parsers do it (`vllm_parsers.py`, which alone imports vLLM); here is what is asked of
them and what they say, so that a server without parsers has neither them nor vLLM in its process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import UNSET, Struct

from tinfer.api.responses import DeltaToolCall, ToolCall
from tinfer.api.schemas import Message
from tinfer.api.tools import ToolUse
from tinfer.core.sampling import SamplingSpec


class Asked(Struct, frozen=True):
    """What a parser has to know of a chat.

    `template_kwargs` are all that the chat's template was given, tools apart.
    """

    messages: list[Message]
    tools: ToolUse
    template_kwargs: dict[str, Any]
    prompt_token_ids: list[int]
    include_reasoning: bool = True


class Said(Struct):
    """A whole answer, taken apart."""

    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]
    reasoning_tokens: int


class Piece(Struct):
    """What a delta adds to each part of an answer."""

    reasoning: str | None
    content: str | None
    tool_calls: list[DeltaToolCall]

    def followed_by(self, later: Piece | None) -> Piece:
        """Both in one, as a client would add them up."""
        if later is None:
            return self
        return Piece(
            _joined(self.reasoning, later.reasoning),
            _joined(self.content, later.content),
            _merged(self.tool_calls, later.tool_calls),
        )


def _joined(before: str | None, after: str | None) -> str | None:
    return before if after is None else (before or "") + after


def _merged(before: list[DeltaToolCall], after: list[DeltaToolCall]) -> list[DeltaToolCall]:
    """The calls of both, with further arguments of a call added to what is there of it."""
    calls = [*before]
    for call in after:
        last = calls[-1] if calls else None
        if last is None or last.index != call.index or call.id is not UNSET:
            calls.append(call)
        elif last.function is UNSET:
            last.function = call.function
        elif call.function is not UNSET and call.function.arguments is not UNSET:
            more = call.function.arguments
            had = last.function.arguments
            last.function.arguments = more if had is UNSET else had + more
    return calls


class AnswerParser(Protocol):
    """Reads one answer: either whole, or piece by piece. Raises whatever a parser raises."""

    def whole(self, text: str, token_ids: Sequence[int]) -> Said: ...

    def piece(self, text: str, token_ids: list[int], finished: bool) -> Piece | None:
        """What a delta adds; None where nothing can be said before the next one."""
        ...

    def count_reasoning(self, token_ids: Sequence[int]) -> int:
        """How many tokens of an answer so far are reasoning."""
        ...


class ChatParsing(Protocol):
    """What becomes of one chat: how it is sampled, and a parser for each of its answers."""

    def adjusted(self, spec: SamplingSpec) -> SamplingSpec:
        """With what the parsers need: a grammar for tools that must be called, special tokens that
        they look for, where reasoning ends. Raises `InvalidRequest`."""
        ...

    def new(self) -> AnswerParser: ...


class Parsers(Protocol):
    """The parsers of a server."""

    @property
    def tools(self) -> bool:
        """Whether there is one for tool calls."""
        ...

    @property
    def reasoning(self) -> bool:
        """Whether there is one for reasoning."""
        ...

    def chat(self, asked: Asked) -> ChatParsing | None:
        """None where answers of this chat are plain text."""
        ...
