"""The chat without a server: inputs, the conversation, figures, the screen, the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tinfer.chat.app
from tinfer.chat.answer import Answer
from tinfer.chat.app import ChatOptions, Terminals
from tinfer.chat.conversation import Conversation, Turn
from tinfer.chat.typed import Input, Piped
from tinfer.cli import main
from tinfer.errors import StartError

# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "whole"),
    [
        (["a"], "a"),
        ([""], ""),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (["a\\", ""], "a\n"),
        (['"""', "a", "", "b", '"""'], "a\n\nb"),
        (['  """a', 'b"""  '], "a\nb"),
        (['"""a"""'], "a"),
        (['"""', "a\\", '"""'], "a\\"),
        (["a\nb"], "a\nb"),
        (["a\nb\\", "c"], "a\nb\nc"),
        (['"""a\nb', '"""'], "a\nb"),
        (['say """x"""'], 'say """x"""'),
    ],
)
def test_lines_become_an_input(lines: list[str], whole: str) -> None:
    typed = Input()
    for line in lines[:-1]:
        assert typed.feed(line) is None
        assert typed.is_open
    assert typed.feed(lines[-1]) == whole
    assert not typed.is_open


def test_an_input_leaves_nothing_for_the_next() -> None:
    typed = Input()
    assert [typed.feed(line) for line in ("a\\", "b", '"""c', '"""', "d")] == [
        None, "a\nb", None, "c", "d",
    ]  # fmt: skip


def test_piped_lines() -> None:
    piped = Piped(io.StringIO('one\r\n\n  \ntwo\\\n"""\nlast'))
    assert [piped.read() for _ in range(4)] == ["one", "two\\", '"""', "last"]
    with pytest.raises(EOFError):
        piped.read()


# --- the conversation ----------------------------------------------------------------------------


@pytest.fixture
def conversation() -> Conversation:
    made = Conversation("be brief")
    made.turns += [Turn("q1", "a1"), Turn("q2", "a", cut=True)]
    return made


def test_what_is_sent(conversation: Conversation) -> None:
    roles = [(m["role"], m["content"]) for m in conversation.messages("q3")]
    assert roles == [
        ("system", "be brief"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a"),
        ("user", "q3"),
    ]
    assert conversation.messages("q3", skip=1) == [
        conversation.messages("q3")[0], *conversation.messages("q3")[3:]
    ]  # fmt: skip


def test_forgetting_and_no_system_prompt(conversation: Conversation) -> None:
    conversation.forget_oldest(1)
    conversation.system = None
    assert [m["content"] for m in conversation.messages("q3")] == ["q2", "a", "q3"]


def test_what_is_saved(conversation: Conversation) -> None:
    assert conversation.as_text() == (
        "system:\nbe brief\n\nuser:\nq1\n\nassistant:\na1\n\nuser:\nq2\n\nassistant:\na [cut]\n"
    )
    saved = json.loads(conversation.as_json())["messages"]
    assert saved[-1] == {"role": "assistant", "content": "a", "cut": True}
    assert saved[:-1] == conversation.messages("")[:-2]


# --- figures -------------------------------------------------------------------------------------

TRACE: dict[str, Any] = {
    "route": "split",
    "prefill_worker": "prefill-0",
    "decode_worker": "decode-0",
    "prompt_tokens": 40,
    "cached_tokens": 16,
    "output_tokens": 5,
    "queue_s": 0.0011,
    "prefill_s": 0.02,
    "ttft_s": 0.0211,
    "handoff_s": 0.004,
    "copy_s": 0.001,
    "handoff_bytes": 3 << 20,
    "recomputed": False,
    "decode_s": 2.0,
    "tpot_s": 0.5,
    "e2el_s": 2.0211,
}


def test_figures_are_the_servers_own() -> None:
    answer = Answer("q", ["x"], "stop", ttft_s=9.0, e2el_s=99.0, output_tokens=9, trace=TRACE)
    assert answer.figures().splitlines() == [
        "  first token  after 21.1 ms (queue 1.1 ms, prefill 20.0 ms)",
        "  output       5 tokens, 2.0 tokens/s",
        "  prompt       40 tokens, 16 of them from the cache",
        "  route        split: prefill-0 -> decode-0",
        "  hand-off     4.0 ms (3.0 MiB, copied in 1.0 ms)",
        "  total        2.02 s",
        "  ended        stop",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"route": "whole", "decode_worker": "prefill-0"}, "  route        whole: prefill-0"),
        ({"decode_worker": None}, "  route        split: prefill-0, no decode"),
        ({"recomputed": True},
         "  hand-off     failed; the decode worker computed the prompt again"),
        ({"handoff_bytes": 512}, "  hand-off     4.0 ms (0.5 KiB, copied in 1.0 ms)"),
        ({"output_tokens": 1, "decode_s": 0.0}, "  output       1 token"),
    ],
)  # fmt: skip
def test_figures_of_other_ways(change: dict[str, Any], line: str) -> None:
    assert line in Answer("q", trace={**TRACE, **change}).figures().splitlines()


def test_figures_of_a_route_without_hand_off() -> None:
    trace = {**TRACE, "handoff_s": None, "copy_s": None, "handoff_bytes": None}
    assert "hand-off" not in Answer("q", trace=trace).figures()


def test_figures_without_the_servers_word() -> None:
    answer = Answer("q", ["x"], "stop", ttft_s=0.5, e2el_s=2.5, prompt_tokens=7, output_tokens=5)
    assert answer.figures().splitlines() == [
        "  first token  after 500.0 ms",
        "  output       5 tokens, 2.0 tokens/s",
        "  prompt       7 tokens",
        "  route        unknown: the server does not say",
        "  total        2.50 s",
        "  ended        stop",
    ]


def test_figures_of_what_did_not_end_well() -> None:
    cut = Answer("q", ["x"], cut=True, ttft_s=0.5, e2el_s=0.5, output_tokens=1)
    assert "  route        unknown: the answer was cut" in cut.figures().splitlines()
    assert "  ended        cut by Ctrl-C" in cut.figures().splitlines()
    assert Answer("q", error="gone").figures().splitlines()[-1] == (
        "  ended        with an error: gone"
    )


def test_the_record_of_an_answer() -> None:
    record = Answer("q", ["x", "y"], "stop", trace=TRACE).record()
    assert list(record)[:3] == ["question", "answer", "finish_reason"]
    assert (record["question"], record["answer"], record["trace"]) == ("q", "xy", TRACE)
    assert json.loads(json.dumps(record)) == record


# --- the terminal --------------------------------------------------------------------------------


def test_a_model_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    said = "a\x1b[2J\x07\x9b\tb\nc\x7f"
    Terminals(interactive=True).show(said)
    assert capsys.readouterr().out == "a\ufffd[2J\ufffd\ufffd\tb\nc\ufffd"
    Terminals(interactive=False).show(said)
    assert capsys.readouterr().out == said


def test_reasoning_goes_beside_the_answers_on_lines_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = Terminals(interactive=False)
    screen.think("Hm, ")
    screen.think("well.")
    screen.show("Yes")
    screen.end()
    screen.think("cut")
    screen.say("(stopped)")
    written = capsys.readouterr()
    assert (written.out, written.err) == ("Yes\n", "Hm, well.\ncut\n(stopped)\n")


def test_reasoning_is_dim_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Terminals(interactive=True).think("a\x07")
    assert capsys.readouterr().err == "\x1b[2ma\ufffd\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    Terminals(interactive=True).think("a\x07")
    assert capsys.readouterr().err == "a\ufffd"


# --- the command line ----------------------------------------------------------------------------


class Ran:
    """What the command handed to the chat, instead of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[ChatOptions] = []
        self.code: int | Exception = 0
        monkeypatch.setattr(tinfer.chat.app, "run", self._run)

    def _run(self, options: ChatOptions) -> int:
        self.options.append(options)
        if isinstance(self.code, Exception):
            raise self.code
        return self.code

    def chat(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["chat", *arguments])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ([], {}),
        (["org/model"], {"model": "org/model"}),
        (["--", "--prefill", "2"], {"serve_options": ("--prefill", "2")}),
        (["m", "--", "--route", "split"], {"model": "m", "serve_options": ("--route", "split")}),
        (["--url", "http://x", "m"], {"model": "m", "url": "http://x"}),
        (["--api-key", "k"], {"api_key": "k"}),
        (["--system", "s", "--max-tokens", "5", "--temperature", "0", "--json", "f"],
         {"system": "s", "max_tokens": 5, "temperature": 0.0, "transcript": Path("f")}),
    ],
)  # fmt: skip
def test_options(ran: Ran, arguments: list[str], fields: dict[str, Any]) -> None:
    result = ran.chat(*arguments)
    assert result.exit_code == 0, result.output
    nothing: dict[str, Any] = dict.fromkeys(
        ("model", "url", "api_key", "system", "max_tokens", "temperature", "transcript")
    )
    assert ran.options == [ChatOptions(**{**nothing, "serve_options": (), **fields})]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b"], "'b' is too much"),
        (["--url", "http://x", "--", "--prefill", "2"], "of no use with --url"),
        (["--max-tokens", "0"], "max-tokens"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_mistakes(ran: Ran, arguments: list[str], said: str) -> None:
    result = ran.chat(*arguments)
    assert (result.exit_code, ran.options) == (2, [])
    assert said in result.output


def test_exit_codes(ran: Ran) -> None:
    ran.code = 1
    assert ran.chat().exit_code == 1
    ran.code = StartError("no server")
    result = ran.chat()
    assert (result.exit_code, result.output) == (2, "tinfer: no server\n")


def test_an_address_that_is_none() -> None:
    result = CliRunner().invoke(main, ["chat", "--url", "ftp:nowhere"])
    assert result.exit_code == 2
    assert result.output.startswith("tinfer: ") and result.output.count("\n") == 1
