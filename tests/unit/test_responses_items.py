"""Deltas of a parsed answer as the items and events of a response."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from tinfer.api.parsing import Piece
from tinfer.api.responses import ChatLogprobEntry, DeltaFunctionCall, DeltaToolCall
from tinfer.api.responses_api.events import Event, Numbered
from tinfer.api.responses_api.items import ItemWriter
from tinfer.errors import ParserFailed


def call(index: int, name: str = "", arguments: str = "") -> DeltaToolCall:
    """What is new of a call; one with a name is the first of it."""
    function = DeltaFunctionCall(name or UNSET, arguments or UNSET)
    return DeltaToolCall(index, f"c{index}" if name else UNSET, "function", function)


def entries(*tokens: str) -> list[ChatLogprobEntry]:
    return [ChatLogprobEntry(token, -1.0, None) for token in tokens]


def happened(events: list[Event]) -> list[str]:
    return [str(type(event).__struct_config__.tag).removeprefix("response.") for event in events]


def shown(writer: ItemWriter) -> list[Any]:
    """The items by type, status and what they hold."""
    found = []
    for item in msgspec.to_builtins(writer.so_far()):
        held = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        found.append((item["type"], item["status"], held))
    return found


def test_what_comes_at_once_is_taken_in_order() -> None:
    writer = ItemWriter(shows_logprobs=False)
    calls = [call(0, "f", "{"), call(0, arguments="}"), call(1, "g")]
    events = writer.write(Piece("Hm.", "Yes.", calls), [])
    assert happened(events) == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", *["function_call_arguments.delta"] * 2),
        *("function_call_arguments.done", "output_item.done", "output_item.added"),
    ]
    indexes = [event.output_index for event in events]  # type: ignore[attr-defined]
    assert indexes == [0] * 6 + [1] * 6 + [2] * 5 + [3]
    assert shown(writer) == [
        ("reasoning", "completed", "Hm."),
        ("message", "completed", "Yes."),
        ("function_call", "completed", "{}"),
        ("function_call", "incomplete", ""),
    ]
    assert happened(writer.close("completed")) == [
        *("function_call_arguments.done", "output_item.done"),
    ]
    assert shown(writer)[-1] == ("function_call", "completed", "")
    assert writer.close("completed") == []


def test_text_after_thought_after_text_is_a_new_message() -> None:
    writer = ItemWriter(shows_logprobs=False)
    for piece in (Piece(None, "a", []), Piece("b", None, []), Piece(None, "c", []), None):
        writer.write(piece, [])
    writer.write(Piece(None, "", []), [])
    writer.close("incomplete")
    assert shown(writer) == [
        ("message", "completed", "a"),
        ("reasoning", "completed", "b"),
        ("message", "incomplete", "c"),
    ]


@pytest.mark.parametrize("arguments", ["", "}"])
def test_a_call_that_is_over_takes_no_more(arguments: str) -> None:
    writer = ItemWriter(shows_logprobs=False)
    writer.write(Piece(None, None, [call(0, "f", "{}"), call(1, "g", "{}")]), [])
    late = Piece(None, None, [call(0, arguments=arguments)])
    if arguments:
        with pytest.raises(ParserFailed):
            writer.write(late, [])
    else:
        assert writer.write(late, []) == []


def test_logprobs_of_what_is_no_text_are_told_by_nobody() -> None:
    writer = ItemWriter(shows_logprobs=True)
    writer.write(Piece("Hm.", None, []), entries("thought"))
    writer.write(Piece(None, "a", []), entries("a"))
    writer.write(None, entries("mark"))
    writer.write(Piece(None, None, [call(0, "f", "{}")]), entries("call"))
    writer.write(Piece(None, "b", []), entries("b"))
    writer.write(None, entries("end"))
    writer.close("completed")
    told = [
        [entry["token"] for entry in item["content"][0]["logprobs"]]
        for item in msgspec.to_builtins(writer.so_far())
        if item["type"] == "message"
    ]
    assert told == [["a"], ["b", "end"]]


def test_events_are_numbered_over_all_frames() -> None:
    writer, numbered = ItemWriter(shows_logprobs=False), Numbered()
    text = numbered.frame(writer.write(Piece(None, "a", []), []))
    text += numbered.frame(writer.close("completed"))
    *blocks, end = text.split(b"\n\n")
    assert end == b""
    for number, block in enumerate(blocks):
        name, data = block.split(b"\n")
        said = msgspec.json.decode(data.removeprefix(b"data: "))
        assert (said["sequence_number"], b"event: " + said["type"].encode()) == (number, name)
