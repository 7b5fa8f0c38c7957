"""`tinfer chat` as a person and as a pipe use it, against servers of the fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.serving import get_json, until_idle, wait_gone
from tests.process.box import Server, running
from tests.process.terminal import (
    CTRL_C,
    CTRL_D,
    PASTE_BEGIN,
    PASTE_END,
    Program,
    on_terminal,
)

CHAT = ("-m", "tinfer", "chat")
# Answers that end only when they are stopped, at a pace that a test can follow.
ENDLESS = {"step_s": 0.01, "mean_output_tokens": 1_000_000}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), ENDLESS, route="split") as made:
        yield made
        made.stop()


@contextmanager
def chatting(folder: Path, *arguments: str) -> Iterator[Program]:
    """A chat at its first prompt, with a transcript in `folder`."""
    with on_terminal(folder, *CHAT, "--json", "said.jsonl", *arguments) as program:
        program.see("Ctrl-D leaves\n> ")
        yield program


def said(folder: Path) -> list[dict[str, Any]]:
    """The transcript."""
    return [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]


def leave(program: Program) -> None:
    program.type(CTRL_D)
    assert program.wait_end() == 0, program.screen


def test_ctrl_c_stops_the_answer_and_not_the_program(server: Server, tmp_path: Path) -> None:
    with chatting(tmp_path, "--url", server.url) as program:
        program.line("tell me a story")
        program.see("\n")
        program.see(" ")
        state = asyncio.run(get_json(f"{server.url}/debug/state"))
        assert sum(state["requests_by_phase"].values()) == 1
        program.type(CTRL_C)
        program.see("(stopped; what has come stays in the conversation)\n> ")
        asyncio.run(until_idle(server.url))
        program.line("/stats")
        assert "tokens/s" in program.see("cut by Ctrl-C\n> ")
        program.type(CTRL_C)
        program.see("(Ctrl-D or /quit leaves)\n> ")
        leave(program)
    (answer,) = said(tmp_path)
    assert (answer["cut"], answer["error"]) == (True, None)
    assert answer["answer"] and answer["output_tokens"] > 0


def test_stats_of_a_whole_answer(server: Server, tmp_path: Path) -> None:
    with chatting(tmp_path, "--url", server.url, "--max-tokens", "5") as program:
        program.line("hello")
        program.see("(the answer has reached its greatest length)\n> ")
        program.line("/stats")
        told = program.see("ended        length\n> ")
        assert "output       5 tokens, " in told
        assert "route        split: prefill-0 -> decode-0" in told
        assert "hand-off     " in told
        leave(program)
    (answer,) = said(tmp_path)
    trace = answer["trace"]
    assert (trace["route"], trace["output_tokens"]) == ("split", 5)
    assert 0 <= trace["queue_s"] <= trace["ttft_s"] <= trace["e2el_s"] <= answer["e2el_s"]


def test_inputs_of_several_lines(server: Server, tmp_path: Path) -> None:
    with chatting(tmp_path, "--url", server.url, "--max-tokens", "1") as program:
        done = "(the answer has reached its greatest length)\n> "
        program.line("one \\")
        program.see(". ")
        program.line("two")
        program.see(done)
        program.line('"""')
        program.see(". ")
        program.line("three")
        program.see(". ")
        program.line('four"""')
        program.see(done)
        program.type(PASTE_BEGIN + "five\nsix" + PASTE_END)
        program.see("six")
        program.line("")
        program.see(done)
        program.line("/retry")
        program.see(done)
        leave(program)
    asked = [answer["question"] for answer in said(tmp_path)]
    assert asked == ["one \ntwo", "three\nfour", "five\nsix", "five\nsix"]


def test_a_paste_where_the_terminal_does_not_mark_it(tmp_path: Path) -> None:
    """As with libedit: lines that are there at once are one input, commands excepted."""
    script = (
        "from tinfer.chat.typed import Terminal\n"
        "t = Terminal(by_time=True)\n"
        "print('ready')\n"
        "for _ in range(4): print(ascii(t.read()), flush=True)\n"
    )
    with on_terminal(tmp_path, "-c", script) as program:
        program.see("> ")
        program.type("one\rtwo\r\rthree\r")
        program.see("'one\\ntwo\\n\\nthree'")
        program.see("> ")
        program.type("/a\r/b\r")
        program.see("'/a'")
        program.see("'/b'")
        program.line("last")
        program.see("'last'")
        assert program.wait_end() == 0


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with on_terminal(tmp_path, *CHAT, "--url", NOWHERE) as program:
        assert program.see("leaves\n> ").count("error: nothing answers at " + NOWHERE) == 1
        program.line("hello")
        program.see("error: nothing answers at " + NOWHERE)
        program.see("\n> ")
        program.line("/system be brief")
        program.see("the system prompt is set\n> ")
        leave(program)
        assert "Traceback" not in program.screen


def test_a_refusal_is_one_line(server: Server, tmp_path: Path) -> None:
    with chatting(tmp_path, "--url", server.url, "--temperature", "99") as program:
        program.line("hello")
        assert "error: " in program.see("temperature")
        program.see("\n> ")
        leave(program)


# --- a server of its own -------------------------------------------------------------------------

OWN = ("--", "--engine", "fake", "--fake-engine", "step_s=0.01")
OWN_ENDLESS = (*OWN, "--fake-engine", "mean_output_tokens=1000000")


def family_of(program: Program) -> list[psutil.Process]:
    """The chat's server with all that belongs to it."""
    children = psutil.Process(program.process.pid).children(recursive=True)
    assert len(children) >= 3, program.screen
    return children


def test_its_own_server_comes_and_goes_with_it(tmp_path: Path) -> None:
    with chatting(tmp_path, *OWN) as program:
        assert "its own server, ready in" in program.screen
        assert "is ready" in program.screen, "the progress of the start"
        family = family_of(program)
        program.line("hello")
        program.see("\n> ")
        leave(program)
    assert wait_gone(family) == []
    assert "KV blocks" not in program.screen, "the server's own output stays out of the chat"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_its_server_in_the_middle_of_an_answer(
    tmp_path: Path, number: signal.Signals
) -> None:
    with chatting(tmp_path, *OWN_ENDLESS) as program:
        family = family_of(program)
        program.line("hello")
        program.see("\n")
        program.see(" ")
        program.process.send_signal(number)
        code = program.wait_end()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert wait_gone(family) == []


def test_a_signal_at_the_prompt(tmp_path: Path) -> None:
    with chatting(tmp_path, *OWN) as program:
        family = family_of(program)
        program.process.terminate()
        assert program.wait_end() == 128 + signal.SIGTERM
    assert wait_gone(family) == []


def test_its_server_dies(tmp_path: Path) -> None:
    with chatting(tmp_path, *OWN_ENDLESS) as program:
        master, *rest = family_of(program)
        program.line("hello")
        program.see("\n")
        program.see(" ")
        master.kill()
        program.see("error: the server has ended with signal SIGKILL")
        program.see("\n> ")
        program.line("hello?")
        program.see("error: the server has ended with signal SIGKILL")
        program.see("\n> ")
        leave(program)
    assert wait_gone([master, *rest]) == []


def test_ctrl_c_during_the_start(tmp_path: Path) -> None:
    with on_terminal(tmp_path, *CHAT, *OWN, "--fake-engine", "start_s=1000") as program:
        program.see("starting workers")
        family = family_of(program)
        program.type(CTRL_C)
        assert program.wait_end() == 130
    assert wait_gone(family) == []


def test_a_server_that_cannot_start(tmp_path: Path) -> None:
    with on_terminal(tmp_path, *CHAT, "--", "--engine", "fake", "--prefill", "-1") as program:
        program.see("tinfer: the server did not start (exit code 2)")
        assert program.wait_end() == 2


# --- without a terminal --------------------------------------------------------------------------


def piped(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *CHAT, "--json", str(folder / "said.jsonl"), *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1"},
    )


def test_piped_questions(server: Server, tmp_path: Path) -> None:
    done = piped(tmp_path, "one\n\ntwo\\\n", "--url", server.url, "--max-tokens", "3")
    assert done.returncode == 0, done.stderr
    answers = said(tmp_path)
    assert [answer["question"] for answer in answers] == ["one", "two\\"]
    assert done.stdout == "".join(answer["answer"] + "\n" for answer in answers)
    assert done.stderr == "(the answer has reached its greatest length)\n" * 2


def test_piped_questions_of_which_one_fails(server: Server, tmp_path: Path) -> None:
    too_long = "x" * 40_000
    done = piped(tmp_path, f"{too_long}\ntwo\n", "--url", server.url, "--max-tokens", "3")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("error: ") == 1
    failed, answered = said(tmp_path)
    assert failed["error"] and not failed["answer"]
    assert done.stdout == answered["answer"] + "\n"


def test_piped_questions_to_its_own_server(tmp_path: Path) -> None:
    done = piped(tmp_path, "one\n/stats\n", "--max-tokens", "3", *OWN)
    assert done.returncode == 0, done.stderr
    (answer,) = said(tmp_path)
    assert done.stdout == answer["answer"] + "\n"
    assert "is ready" in done.stderr and "route " in done.stderr


def test_ctrl_c_ends_piped_questions(server: Server, tmp_path: Path) -> None:
    arguments = [sys.executable, *CHAT, "--url", server.url]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    asyncio.run(until_idle(server.url))
