"""Each example is run as a user would, against a real server and against none."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import ServeProcess, until_idle

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
# The rest ask a server that runs.
WITHOUT_SERVER = ["offline.py"]
ASKING = [name for name in NAMES if name not in WITHOUT_SERVER]


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nothing answers, and nothing else can be started meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_all_examples_are_known() -> None:
    assert NAMES == ["many_requests.py", "offline.py", "openai_client.py", "stream.py"]


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str) -> None:
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("--base-url" in done.stdout) == (name in ASKING)


@pytest.mark.parametrize("name", ASKING)
def test_no_server_is_one_clear_line(name: str, nowhere: str) -> None:
    done = run(name, "--base-url", nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"{name}: nothing answers at {nowhere}.*; start a server with `tinfer serve`\n",
        done.stderr,
    )


async def test_stream(server: ServeProcess) -> None:
    done = run("stream.py", "--base-url", server.url, "--max-tokens", "9", "Hello there")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 1
    number = re.match(r"(\d+) tokens, finish reason (stop|length)", done.stderr)
    assert number is not None and 1 <= int(number.group(1)) <= 9
    await until_idle(server.url)


async def test_ctrl_c_stops_the_stream_on_the_server_too(server: ServeProcess) -> None:
    """The answer would not end for a long time by itself."""
    words = ("--base-url", server.url, "--max-tokens", "30000", "Hello")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / "stream.py"),
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = await process.communicate()
    assert (process.returncode, said) == (130, b"")
    await until_idle(server.url)


async def test_openai_client(server: ServeProcess) -> None:
    done = run("openai_client.py", "--base-url", server.url, "--max-tokens", "9")
    assert done.returncode == 0, done.stderr
    whole, streamed = re.fullmatch(  # type: ignore[union-attr]
        r"whole:    (.*)\nstreamed: (.*)\n", done.stdout, re.DOTALL
    ).groups()
    assert whole == streamed != ""
    assert re.search(r"\d+ \+ \d+ tokens from model \S+", done.stderr)
    await until_idle(server.url)


def test_openai_client_without_its_package(tmp_path: Path) -> None:
    (tmp_path / "openai.py").write_text("raise ImportError\n")
    done = run("openai_client.py", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "openai_client.py: needs the openai package: pip install openai\n"


@pytest.mark.parametrize(
    "options", [("--concurrency", "4"), ("--request-rate", "500", "--prompt", "a", "--prompt", "b")]
)
async def test_many_requests(
    server: ServeProcess, tmp_path: Path, options: tuple[str, ...]
) -> None:
    path = tmp_path / "figures.json"
    size = ("--num-requests", "30", "--max-tokens", "7", "--ignore-eos")
    done = run("many_requests.py", "--base-url", server.url, *size, "--json", str(path), *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("30 of 30 requests completed")
    assert "30/30" in done.stderr, "no progress bar"
    figures = json.loads(path.read_text())
    assert (figures["num_requests"], figures["num_completed"], figures["num_failed"]) == (30, 30, 0)
    assert (figures["errors"], figures["output_tokens"]) == ({}, 210)
    assert figures["prompt_tokens"] >= 30
    for name in ("ttft_s", "tpot_s", "e2el_s"):
        assert figures[name].keys() == {"mean", "p50", "p90", "p99"}
        assert 0 < figures[name]["p50"] <= figures[name]["p90"] <= figures[name]["p99"]
    assert figures["ttft_s"]["mean"] < figures["e2el_s"]["mean"] <= figures["duration_s"]
    await until_idle(server.url)


async def test_many_requests_that_fail(server: ServeProcess, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    size = ("--num-requests", "3", "--max-tokens", "100000000", "--no-progress")
    done = run("many_requests.py", "--base-url", server.url, *size, "--json", str(path))
    assert (done.returncode, done.stderr) == (1, "")
    assert "failed: 3 x BadRequest" in done.stdout
    figures = json.loads(path.read_text())
    assert (figures["num_completed"], figures["num_failed"]) == (0, 3)
    assert (figures["errors"], figures["ttft_s"]) == ({"BadRequest": 3}, None)
    await until_idle(server.url)


def test_offline() -> None:
    done = run("offline.py", "--max-tokens", "5", "--serve", "engine=fake", "Hello", "Good day")
    assert done.returncode == 0, done.stderr
    assert "is ready" in done.stderr and "100%" in done.stderr
    *chats, _, _, _, last = done.stdout.splitlines()
    assert len(chats) == 2 and all(re.match(r"\d+ tokens in: '.+'", line) for line in chats)
    assert re.fullmatch(r"'Good day' -> .+ \((stop|length), log probability -\d+\.\d+\)", last)


@pytest.mark.parametrize("option", ["engin=fake", "prefill=x", "port=80"])
def test_offline_with_an_option_that_is_none(option: str) -> None:
    done = run("offline.py", "--serve", option)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"offline.py: .*{option.partition('=')[0]}.*\n", done.stderr)
