"""A streamed answer as output items: what a delta adds to them, and the events that say so."""

from __future__ import annotations

from typing import Protocol

from msgspec import UNSET

from tinfer.api.parsing import Piece
from tinfer.api.responses import ChatLogprobEntry, DeltaToolCall, ToolCall, new_id
from tinfer.api.responses_api.bodies import (
    FunctionCallItem,
    Item,
    ItemStatus,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from tinfer.api.responses_api.events import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    TextDelta,
    TextDone,
)
from tinfer.errors import ParserFailed

Logprobs = list[ChatLogprobEntry]


def message_item(text: str, status: ItemStatus, logprobs: Logprobs | None) -> MessageItem:
    """What was said."""
    return MessageItem(new_item_id("msg"), [OutputText(text, [], logprobs)], status)


def reasoning_item(text: str, status: ItemStatus) -> ReasoningItem:
    """What was thought."""
    return ReasoningItem(new_item_id("rs"), [ReasoningText(text)], status)


def call_item(call: ToolCall, status: ItemStatus) -> FunctionCallItem:
    """What is to be called."""
    function = call.function
    item_id = new_item_id("fc")
    return FunctionCallItem(item_id, call.id, function.name, function.arguments, status)


def new_item_id(prefix: str) -> str:
    """As OpenAI and vLLM name items: by their kind."""
    return f"{prefix}_{new_id()}"


class _Open(Protocol):
    """An item that is being written."""

    def added(self) -> list[Event]: ...

    def done(self) -> list[Event]:
        """All but the event that the item is done."""
        ...

    def item(self, status: ItemStatus) -> Item: ...


class _OpenMessage:
    def __init__(self, index: int, shows_logprobs: bool) -> None:
        self._id, self._index = new_item_id("msg"), index
        self._text: list[str] = []
        self.logprobs: Logprobs = []
        self._shows_logprobs = shows_logprobs

    def added(self) -> list[Event]:
        empty = MessageItem(self._id, [], "in_progress")
        part = OutputText("", [], [])
        return [ItemAdded(self._index, empty), PartAdded(self._id, self._index, part)]

    def delta(self, text: str, logprobs: Logprobs) -> Event:
        self._text.append(text)
        self.logprobs += logprobs
        return TextDelta(self._id, self._index, text, logprobs)

    def done(self) -> list[Event]:
        (part,) = self.item("completed").content
        return [
            TextDone(self._id, self._index, part.text, self.logprobs),
            PartDone(self._id, self._index, part),
        ]

    def item(self, status: ItemStatus) -> MessageItem:
        logprobs = self.logprobs if self._shows_logprobs else None
        return MessageItem(self._id, [OutputText("".join(self._text), [], logprobs)], status)


class _OpenReasoning:
    def __init__(self, index: int) -> None:
        self._id, self._index = new_item_id("rs"), index
        self._text: list[str] = []

    def added(self) -> list[Event]:
        empty = ReasoningItem(self._id, [], "in_progress")
        part = ReasoningText("")
        return [ItemAdded(self._index, empty), PartAdded(self._id, self._index, part)]

    def delta(self, text: str) -> Event:
        self._text.append(text)
        return ReasoningDelta(self._id, self._index, text)

    def done(self) -> list[Event]:
        text = "".join(self._text)
        return [
            ReasoningDone(self._id, self._index, text),
            PartDone(self._id, self._index, ReasoningText(text)),
        ]

    def item(self, status: ItemStatus) -> ReasoningItem:
        return ReasoningItem(self._id, [ReasoningText("".join(self._text))], status)


class _OpenCall:
    def __init__(self, index: int, number: int, call_id: str, name: str) -> None:
        self._id, self._index = new_item_id("fc"), index
        self.number, self._call_id, self._name = number, call_id, name
        self._arguments: list[str] = []

    def added(self) -> list[Event]:
        return [ItemAdded(self._index, self.item("in_progress"))]

    def delta(self, arguments: str) -> Event:
        self._arguments.append(arguments)
        return ArgumentsDelta(self._id, self._index, arguments)

    def done(self) -> list[Event]:
        arguments = "".join(self._arguments)
        return [ArgumentsDone(self._id, self._index, self._name, arguments)]

    def item(self, status: ItemStatus) -> FunctionCallItem:
        arguments = "".join(self._arguments)
        return FunctionCallItem(self._id, self._call_id, self._name, arguments, status)


class ItemWriter:
    """The items of one streamed answer: those that are done, and the one that is being written.

    Logprobs go with the text of a message; those of tokens that have no text of their own, such as
    the half of a character, wait for the next text, or are told of when the message is done. Those
    of what is thought or called are told by nobody.
    """

    def __init__(self, shows_logprobs: bool) -> None:
        self._shows_logprobs = shows_logprobs
        self._done: list[Item] = []
        self._open: _Open | None = None
        self._waiting: Logprobs = []

    def write(self, piece: Piece | None, logprobs: Logprobs) -> list[Event]:
        """What a delta adds. Raises `ParserFailed` where a parser goes back to an earlier call."""
        self._waiting += logprobs
        if piece is None:
            return []
        events: list[Event] = []
        if piece.reasoning:
            events += self._think(piece.reasoning)
        if piece.content:
            events += self._say(piece.content)
        for call in piece.tool_calls:
            events += self._call(call)
        if piece.reasoning or piece.tool_calls:
            self._waiting = []
        return events

    def close(self, status: ItemStatus) -> list[Event]:
        """The answer is over, and with it the item that is being written, if there is one."""
        if isinstance(self._open, _OpenMessage):
            self._open.logprobs += self._waiting
        return self._end(status)

    def so_far(self) -> list[Item]:
        """All items, the one that is being written as an incomplete one."""
        if self._open is None:
            return self._done
        return [*self._done, self._open.item("incomplete")]

    def _say(self, text: str) -> list[Event]:
        events: list[Event] = []
        is_open = self._open
        if not isinstance(is_open, _OpenMessage):
            is_open = _OpenMessage(self._next_index, self._shows_logprobs)
            events = self._replace(is_open)
        events.append(is_open.delta(text, self._waiting))
        self._waiting = []
        return events

    def _think(self, text: str) -> list[Event]:
        events: list[Event] = []
        is_open = self._open
        if not isinstance(is_open, _OpenReasoning):
            is_open = _OpenReasoning(self._next_index)
            events = self._replace(is_open)
        events.append(is_open.delta(text))
        return events

    def _call(self, call: DeltaToolCall) -> list[Event]:
        function = call.function
        if function is UNSET:
            return []
        events: list[Event] = []
        arguments = "" if function.arguments is UNSET else function.arguments
        is_open = self._open
        if not isinstance(is_open, _OpenCall) or is_open.number != call.index:
            if function.name is UNSET:
                if not arguments:
                    return []
                raise ParserFailed("the parser went back to a call that was over")
            call_id = new_item_id("call") if call.id is UNSET else call.id
            is_open = _OpenCall(self._next_index, call.index, call_id, function.name)
            events = self._replace(is_open)
        if arguments:
            events.append(is_open.delta(arguments))
        return events

    @property
    def _next_index(self) -> int:
        return len(self._done) + (self._open is not None)

    def _replace(self, next_one: _Open) -> list[Event]:
        events = self._end("completed")
        self._open = next_one
        return events + next_one.added()

    def _end(self, status: ItemStatus) -> list[Event]:
        is_open, self._open = self._open, None
        if is_open is None:
            return []
        item = is_open.item(status)
        events = [*is_open.done(), ItemDone(len(self._done), item)]
        self._done.append(item)
        return events
