"""`tinfer top` as a person, a script and a pipe use it, on servers of the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.process.box import running, until
from tests.process.load import Request, completion
from tests.process.terminal import CTRL_C, Program, on_terminal

TOP = ("-m", "tinfer", "top")
KEY = "sk-of-a-test"
# Answers that end when they are told to, at a pace that a test can follow.
STEADY = {"step_s": 0.01, "mean_output_tokens": 1_000_000, "num_blocks": 512, "block_tokens": 8}
NOWHERE = "http://127.0.0.1:9"
CTRL_Z = "\x1a"
OTHER_SCREEN, FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
CURSOR_SHOWN = "\x1b[?25h"
BOLD_RED = "\x1b[1;31m"
# Stands in for a shell, which has the terminal before and after.
SHELL = """
import signal, subprocess, sys, termios
signal.signal(signal.SIGINT, lambda *_: None)
code = subprocess.call([sys.executable, *sys.argv[1:]])
shown = bool(termios.tcgetattr(0)[3] & termios.ECHO)
print(f"ended with {code}, typed text is shown: {shown}")
"""


def top(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *TOP, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
    )


def endless(*prompts: list[int]) -> list[Request]:
    return [completion(prompt, max_tokens=1500, ignore_eos=True) for prompt in prompts]


async def test_one_view_of_a_server_that_works(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=1, decode=1) as server:
        await server.answer(completion([3] * 10, max_tokens=4, ignore_eos=True))
        under_way = asyncio.create_task(server.answer(*endless([1, 2, 3] * 20, [7] * 30)))
        await server.until_phase(decoding=2)
        file = tmp_path / "view.json"
        done = await asyncio.to_thread(
            top, server.url, "--interval", "0.3", "--json", str(file), COLUMNS="80"
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        plain = await asyncio.to_thread(top, server.url, "--interval", "0.1")
        assert plain.returncode == 0 and "2 decoding" in plain.stdout, "no terminal: once"
        under_way.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await under_way
        told = json.loads(file.read_text())
        assert (told["url"], told["status"], told["is_healthy"]) == (server.url, "ok", True)
        assert told["requests_by_phase"]["decoding"] == 2
        assert told["interval_s"] > 0 and told["uptime_s"] >= 0
        assert told["output_tokens_per_s"] > 0 and told["itl"]["num"] > 0
        assert told["itl"]["p50_s"] <= told["itl"]["p99_s"]
        assert told["ttft"] == {"num": 0, "mean_s": None, "p50_s": None, "p99_s": None}
        assert (told["requests"]["num_accepted"], told["requests"]["num_answered"]) == (3, 1)
        assert (told["waiting"], told["was_restarted"]) == ([], False)
        prefill, decode = told["workers"]
        assert (prefill["id"], decode["id"]) == ("prefill-0", "decode-0")
        assert (decode["state"], decode["generation"], decode["num_running"]) == ("ready", 1, 2)
        assert 0 < decode["kv_share"] < 1 and 0 < decode["busy_share"] <= 1
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        assert server.url in lines[0] and "2 decoding" in done.stdout
        assert any(line.startswith("decode-0") and "ready" in line for line in lines)
        assert "\x1b" not in done.stdout, "colours are for terminals"
        await server.idle()
        server.stop()
    done = await asyncio.to_thread(top, "--url", server.url, "--once", "--interval", "0.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tinfer: nothing answers at {server.url}")
    assert done.stderr.count("\n") == 1


async def test_a_key_that_is_wanted(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=1, decode=1, api_key=KEY) as server:
        done = await asyncio.to_thread(top, server.url, "--once", "--api-key", "sk-other")
        assert (done.returncode, done.stdout) == (2, "")
        assert "API key" in done.stderr and done.stderr.count("\n") == 1
        with on_terminal(tmp_path, *TOP, server.url) as program:
            assert await asyncio.to_thread(program.wait_end) == 2, program.screen
            assert program.screen.count("tinfer: an API key is required") == 1
            check_restored(program)
        done = await asyncio.to_thread(
            top, server.url, "--json", "-", "--interval", "0.1", TINFER_API_KEY=KEY
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["workers"][0]["id"] == "prefill-0"
        assert KEY not in done.stdout


def check_restored(program: Program) -> None:
    """The terminal is on its first screen, with a cursor."""
    written = program.written
    assert written.rfind(OTHER_SCREEN) < written.rfind(FIRST_SCREEN)
    assert written.rfind("\x1b[?25l") < written.rfind(CURSOR_SHOWN)


async def test_a_live_view_while_workers_and_server_come_and_go(tmp_path: Path) -> None:
    with running(tmp_path, {**STEADY, "start_s": 1.5}, prefill=1, decode=1) as server:
        with on_terminal(tmp_path, *TOP, server.url, "--interval", "0.5") as program:
            await asyncio.to_thread(program.see, "q or Ctrl-C leaves")
            await asyncio.to_thread(program.see, "decode-0")
            assert not program.echoes
            await server.signal("decode-0", signal.SIGKILL)
            await asyncio.to_thread(program.see, "restarting")
            await server.until_worker("decode-0", "ready", generation=2)
            program.type(CTRL_Z)
            process = psutil.Process(program.process.pid)

            async def status() -> str:
                return str(process.status())

            await until(status, lambda seen: seen == psutil.STATUS_STOPPED)
            assert program.echoes
            process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(program.see, "decode-0")
            await server.idle()
            server.stop()
            await asyncio.to_thread(program.see, f"nothing answers at {server.url}")
            await asyncio.to_thread(program.see, "trying on")
            assert program.process.poll() is None
            program.type("xq")
            assert await asyncio.to_thread(program.wait_end) == 0, program.screen
            check_restored(program)
            # Given back at Ctrl-Z and at the end.
            assert program.written.count(OTHER_SCREEN) == program.written.count(FIRST_SCREEN) == 2


@pytest.mark.parametrize(("keys", "code"), [(CTRL_C, 130), ("q", 0), ("Q", 0)])
def test_it_can_be_left_while_no_server_is_there(
    tmp_path: Path, keys: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    with on_terminal(tmp_path, "-c", SHELL, *TOP, NOWHERE, "--interval", "600") as program:
        program.see("nothing answers at " + NOWHERE)
        assert not program.echoes
        # Drawn anew at once, and not with the next look.
        program.resize(40)
        program.see("nothing answers at " + NOWHERE)
        program.type(keys)
        program.see(f"ended with {code}, typed text is shown: True")
        assert program.wait_end() == 0
        check_restored(program)
        assert "Traceback" not in program.screen
        assert BOLD_RED in program.written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_terminal_back(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with on_terminal(tmp_path, *TOP, NOWHERE) as program:
        program.see("trying on")
        program.process.send_signal(number)
        assert program.wait_end() == 128 + number, program.screen
        check_restored(program)
        assert BOLD_RED not in program.written
