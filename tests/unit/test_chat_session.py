"""A session with a scripted user and a scripted server: what is asked, kept, said and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinfer.chat.answer import Answer
from tinfer.chat.asking import Asker, Wishes, unseen
from tinfer.chat.conversation import Conversation, Message
from tinfer.chat.session import Session
from tinfer.client import ConnectionFailed, TinferClientError

END = EOFError()
CTRL_C = KeyboardInterrupt()


class Script:
    """The user: inputs and keys in order, the end after the last."""

    def __init__(self, *inputs: str | BaseException) -> None:
        self._inputs = [*inputs, END]

    def read(self) -> str:
        item = self._inputs.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item


class Paper:
    """The screen: what was said, and the answers."""

    def __init__(self) -> None:
        self.answers = ""
        self.thoughts = ""
        self.said: list[str] = []

    def show(self, text: str) -> None:
        self.answers += text

    def think(self, text: str) -> None:
        self.thoughts += text

    def end(self) -> None:
        self.answers += "\n"

    def say(self, text: str) -> None:
        self.said.append(text)


class ScriptedAsker(Asker):
    """The server: a reply per question, as pieces and maybe what interrupts them."""

    def __init__(self, replies: dict[str, list[Any]]) -> None:
        super().__init__("http://127.0.0.1:1", None, Wishes(), lambda text: None)
        self._replies = replies
        self.sent: list[list[Message]] = []

    async def fill(
        self,
        answer: Answer,
        conversation: Conversation,
        show: Callable[[str], None],
        think: Callable[[str], None] = unseen,
    ) -> None:
        self.sent.append(conversation.messages(answer.question))
        for piece in self._replies.get(answer.question, [answer.question.upper()]):
            if isinstance(piece, BaseException):
                raise piece
            if isinstance(piece, dict) and "think" in piece:
                answer.thoughts.append(piece["think"])
                think(piece["think"])
            elif isinstance(piece, dict):
                answer.finish_reason = piece["finish_reason"]
            else:
                answer.pieces.append(piece)
                show(piece)


class Chat:
    """A whole session, run."""

    def __init__(
        self, *inputs: str | BaseException, replies: dict[str, list[Any]] | None = None, **more: Any
    ) -> None:
        self.paper = Paper()
        self.asker = ScriptedAsker(replies or {})
        self.session = Session(self.asker, Script(*inputs), self.paper, **more)

    def run(self) -> Chat:
        self.session.run()
        return self

    @property
    def sent(self) -> list[list[str]]:
        return [[message["content"] for message in messages] for messages in self.asker.sent]


def test_history_is_sent_again() -> None:
    chat = Chat("a", "b", "  ", "c", system="s").run()
    assert chat.sent == [
        ["s", "a"],
        ["s", "a", "A", "b"],
        ["s", "a", "A", "b", "B", "c"],
    ]
    assert chat.paper.answers == "A\nB\nC\n"
    assert (chat.paper.said, chat.session.num_failed) == ([], 0)


def test_a_cut_answer_stays_marked(tmp_path: Path) -> None:
    saved = tmp_path / "saved.txt"
    chat = Chat("a", "b", f"/save {saved}", replies={"a": ["one ", "two", CTRL_C]}).run()
    assert chat.sent[1] == ["a", "one two", "b"]
    assert chat.paper.said[0] == "(stopped; what has come stays in the conversation)"
    assert "one two [cut]" in saved.read_text()
    assert chat.session.num_failed == 0


def test_an_answer_cut_before_its_first_token_is_not_kept() -> None:
    chat = Chat("a", "b", replies={"a": [CTRL_C]}).run()
    assert chat.sent == [["a"], ["b"]]
    assert "not kept" in chat.paper.said[0]


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    chat = Chat(CTRL_C, "a", CTRL_C).run()
    assert chat.paper.said == ["(Ctrl-D or /quit leaves)"] * 2
    assert chat.sent == [["a"]]


def test_where_nobody_types_ctrl_c_ends_it() -> None:
    for inputs, replies in (([CTRL_C], {}), (["a"], {"a": [CTRL_C]})):
        chat = Chat(*inputs, replies=replies, interactive=False)
        with pytest.raises(KeyboardInterrupt):
            chat.run()


@pytest.mark.parametrize("pieces", [[], ["half"]])
def test_a_failure_is_one_line_and_the_chat_goes_on(pieces: list[str]) -> None:
    failure = ConnectionFailed("nothing answers")
    chat = Chat("a", "b", "/stats", replies={"a": [*pieces, failure]}).run()
    assert chat.paper.said[0] == "error: nothing answers"
    assert chat.paper.answers == "".join([*(f"{p}\n" for p in pieces), "B\n"])
    assert chat.sent == [["a"], ["b"]], "a broken answer is not history"
    assert chat.session.num_failed == 1


def test_the_end_of_an_own_server_is_the_better_reason() -> None:
    failing = {"a": [ConnectionFailed("nothing answers")]}
    ended = Chat("a", replies=failing, why_gone=lambda: "the server has ended").run()
    assert ended.paper.said == ["error: the server has ended"]
    alive = Chat("a", replies=failing, why_gone=lambda: None).run()
    assert alive.paper.said == ["error: nothing answers"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (["x", {"finish_reason": "length"}], ["(the answer has reached its greatest length)"]),
        (["x", {"finish_reason": "stop"}], []),
        ([{"finish_reason": "stop"}], ["(the answer is empty)"]),
        ([{"think": "Hm."}, {"finish_reason": "stop"}], ["(the answer is empty)"]),
        (
            [{"think": "Hm."}, {"finish_reason": "length"}],
            ["(the answer has reached its greatest length before it began)"],
        ),
        ([{"think": "Hm."}, CTRL_C], ["(stopped before it answered; the question is not kept)"]),
    ],
)
def test_how_an_answer_ended(reply: list[Any], said: list[str]) -> None:
    assert Chat("a", replies={"a": reply}).run().paper.said == said


def test_reasoning_is_shown_and_recorded_but_no_part_of_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    replies = {"a": [{"think": "Hm, "}, {"think": "well."}, "Yes."]}
    chat = Chat("a", "b", replies=replies, transcript=path).run()
    assert (chat.paper.thoughts, chat.paper.answers) == ("Hm, well.", "Yes.\nB\n")
    assert chat.sent[1] == ["a", "Yes.", "b"]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["answer"], one["reasoning"]) for one in records] == [
        ("Yes.", "Hm, well."),
        ("B", None),
    ]


def test_retry_replaces_the_last_turn() -> None:
    assert Chat("a", "b", "/retry").run().sent[1:] == [["a", "A", "b"], ["a", "A", "b"]]


@pytest.mark.parametrize("interruption", [TinferClientError("broken"), CTRL_C])
def test_retry_after_nothing_was_kept(interruption: BaseException) -> None:
    chat = Chat("a", "b", "/retry", replies={"b": [interruption]}).run()
    assert chat.sent[1:] == [["a", "A", "b"], ["a", "A", "b"]]


def test_retry_after_clear_asks_with_no_history() -> None:
    assert Chat("a", "b", "/clear", "/retry", "c").run().sent[2:] == [["b"], ["b", "B", "c"]]


def test_system_prompt() -> None:
    chat = Chat(
        "/system", "/system be brief", "a", "/system", "/clear", "b", "/system off", "c"
    ).run()
    assert chat.sent == [["be brief", "a"], ["be brief", "b"], ["b", "B", "c"]]
    assert chat.paper.said == [
        "system prompt: none",
        "the system prompt is set",
        "system prompt: be brief",
        "everything said is forgotten",
        "no system prompt",
    ]


def test_questions_that_begin_with_a_slash() -> None:
    chat = Chat("//etc is what?", "/a\nb", " /help").run()
    assert [sent[-1] for sent in chat.sent] == ["/etc is what?", "/a\nb"]
    assert chat.paper.said[0].startswith("  /stats")


def test_mistakes_in_commands_count_as_failed(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    nowhere = tmp_path / "no" / "where"
    chat = Chat("/nope", "/retry", "/save", f"/save {there}", f"/save {nowhere}").run()
    assert chat.paper.said == [
        "error: /nope is no command; /help lists them, //... is a question",
        "error: there is no question to ask again",
        "error: /save needs the name of a file",
        f"error: {there} exists; it is not overwritten",
        f"error: cannot write {nowhere}: No such file or directory",
    ]
    assert chat.session.num_failed == 5
    assert there.read_text() == "mine"


def test_save_again_in_the_same_session(tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    chat = Chat("a", f"/save {path}", "b", f"/save {path}").run()
    assert [m["content"] for m in json.loads(path.read_text())["messages"]] == ["a", "A", "b", "B"]
    assert chat.paper.said == [f"1 turn saved in {path}", f"2 turns saved in {path}"]


def test_the_transcript_has_every_question(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    replies = {"b": ["x", TinferClientError("broken")], "c": ["y", CTRL_C]}
    Chat("a", "b", "c", "/stats", replies=replies, transcript=path).run()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["question"], r["answer"], r["error"], r["cut"]) for r in records] == [
        ("a", "A", None, False),
        ("b", "x", "broken", False),
        ("c", "y", None, True),
    ]


def test_a_transcript_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    chat = Chat("a", "b", transcript=tmp_path / "no" / "file").run()
    assert (
        chat.paper.said
        == [f"error: cannot write {tmp_path}/no/file: No such file or directory"] * 2
    )
    assert chat.paper.answers == "A\nB\n"


def test_quit_reads_no_further() -> None:
    assert Chat("a", "/quit", "b").run().sent == [["a"]]


def test_stats_before_and_after() -> None:
    chat = Chat("/stats", "a", "/stats").run()
    assert chat.paper.said[0] == "no answer yet"
    assert "route" in chat.paper.said[1]
