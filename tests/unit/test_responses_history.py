"""Items of a response's input as the messages of a chat."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tinfer.api.responses_api.history import InputItem, continues, messages_of
from tinfer.api.schemas import Message

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
SAID = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Yes.", "annotations": []}],
}


def items(*given: dict[str, Any]) -> list[InputItem]:
    return msgspec.convert(list(given), list[InputItem])


def shown(messages: list[Message]) -> list[dict[str, Any]]:
    """Each without its nulls."""
    return [{k: v for k, v in msgspec.to_builtins(m).items() if v is not None} for m in messages]


def test_a_string_is_what_the_user_says() -> None:
    assert shown(messages_of(None, "hi")) == [USER]
    told = messages_of("Be brief.", "hi")
    assert shown(told) == [{"role": "system", "content": "Be brief."}, USER]


def test_one_turn_of_the_assistant_is_one_message() -> None:
    other = {**CALL, "call_id": "c2", "name": "g"}
    given = items(USER, THOUGHT, SAID, CALL, other, RESULT, {**RESULT, "call_id": "c2"}, SAID)
    function = {"name": "f", "arguments": '{"a": 1}'}
    calls = [
        {"id": "c1", "type": "function", "function": function},
        {"id": "c2", "type": "function", "function": function | {"name": "g"}},
    ]
    assert shown(messages_of(None, given)) == [
        USER,
        {"role": "assistant", "reasoning": "Hm.", "content": ["Yes."], "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "tool", "content": "42", "tool_call_id": "c2"},
        {"role": "assistant", "content": ["Yes."]},
    ]


def test_what_is_said_twice_is_two_messages() -> None:
    messages = messages_of(None, items(THOUGHT, THOUGHT, SAID, SAID))
    assert [(m.reasoning, m.content) for m in messages] == [
        *(("Hm.", None), ("Hm.", ["Yes."]), (None, ["Yes."])),
    ]


def test_a_summary_stands_in_for_reasoning() -> None:
    parts = [{"type": "summary_text", "text": "So"}, {"type": "summary_text", "text": "so"}]
    (message,) = messages_of(None, items({"type": "reasoning", "summary": parts, "content": None}))
    assert message.reasoning == "So\nso"


def test_parts_keep_their_order() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = messages_of(None, items({"role": "developer", "content": parts}))
    assert (message.role, message.content) == ("developer", ["a", "b"])


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (SAID, False),
        (SAID | {"status": "completed"}, False),
        (SAID | {"status": "incomplete"}, True),
        ({"role": "assistant", "content": "x", "status": "in_progress"}, True),
        (USER | {"status": "incomplete"}, False),
        (CALL | {"status": "incomplete"}, False),
        (THOUGHT | {"status": "incomplete"}, True),
    ],
)
def test_an_unfinished_answer_goes_on(last: dict[str, Any], expected: bool) -> None:
    assert continues(items(USER, last)) is expected
    assert continues("hi") is continues([]) is False
