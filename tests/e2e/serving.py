"""Starts a real `tinfer serve` and streams from it, as a client would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.leaks import LeakBaseline

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 30.0


class ServeProcess:
    """One `tinfer serve` in its own session, with its standard output and error kept in files."""

    def __init__(
        self,
        log_dir: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix` is a command that changes what the server may do and then becomes it."""
        self.log_dir = log_dir
        self._out = log_dir / "serve.out"
        self._err = log_dir / "serve.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tinfer", "serve", "--port", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **(environment or {})},
            )
        self.url = ""

    def wait_progress(self, text: str) -> None:
        """Return once the output has `text`; fail with the output if it ends or is late first."""
        deadline = time.monotonic() + START_DEADLINE_S
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait_ready(self) -> None:
        """Return once the ready block names the URL; fail with the output if it never does."""
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            found = re.search(r"serves \S+ on (http://\S+)", self._out.read_text())
            if found:
                self.url = found.group(1)
                return
            if self.process.poll() is not None:
                raise AssertionError(f"serve ended with {self.process.returncode}:\n{self.output}")
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"serve was not ready in time:\n{self.output}")

    @property
    def output(self) -> str:
        return self._out.read_text() + self._err.read_text()

    @property
    def error_line(self) -> str:
        """What the command itself said on standard error, without progress and the log."""
        lines = [line for line in self._err.read_text().splitlines() if line.startswith("tinfer: ")]
        assert len(lines) == 1, self.output
        return lines[0]

    def wait_end(self) -> int:
        """The exit code of a server that ends by itself."""
        return self.process.wait(START_DEADLINE_S)

    def run_dir(self) -> Path:
        """Where its sockets are, as its import process was told."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "--run-dir" in words:
                    return Path(words[words.index("--run-dir") + 1])
        raise AssertionError(f"no import process:\n{self.output}")

    def family(self) -> list[psutil.Process]:
        """The master, the import process and the workers, as far as they live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            master = psutil.Process(self.process.pid)
            return [master, *master.children(recursive=True)]
        return []

    def interrupt(self) -> int:
        """Ctrl-C once; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_DEADLINE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)

    def stop(self) -> None:
        """End it however it is."""
        if self.process.poll() is None:
            try:
                self.interrupt()
            except subprocess.TimeoutExpired:
                self.kill()


@contextlib.contextmanager
def serving(
    log_dir: Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[ServeProcess]:
    """A ready server, taken down at the end."""
    server = ServeProcess(log_dir, *arguments, environment=environment, prefix=prefix)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def serving_a_module(
    leak_baseline: LeakBaseline, log_dir: Path, *arguments: str
) -> Iterator[ServeProcess]:
    """The same for the tests of a module: it is no leak of the one that it starts with."""
    with serving(log_dir, *arguments) as server:
        leak_baseline.own_process(server.process.pid)
        leak_baseline.own_path(server.run_dir())
        yield server


def run_to_end(
    log_dir: Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> tuple[int, str]:
    """Run a server that cannot start: its exit code and the line that says why."""
    server = ServeProcess(log_dir, *arguments, environment=environment, prefix=prefix)
    try:
        return server.wait_end(), server.error_line
    finally:
        server.stop()


@dataclass
class Answer:
    """What one streamed choice added up to; `prefixes` is the text after each chunk."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prefixes: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        self.token_ids += choice.get("token_ids") or []
        self.text += choice["text"]
        self.prefixes.append(self.text)
        logprobs = choice.get("logprobs")
        if logprobs:
            self.logprobs += logprobs["token_logprobs"]
            self.top_logprobs += logprobs["top_logprobs"] or []
        if choice["finish_reason"] is not None:
            self.finish_reason = choice["finish_reason"]
            self.stop_reason = choice["stop_reason"]


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of an SSE response, up to `[DONE]`; an error event fails the test."""
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        assert "error" not in event, event
        yield event
    raise AssertionError("the stream ended without [DONE]")


async def complete(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[Answer]:
    """Stream one completion; one answer per choice."""
    answers = [Answer() for _ in range(body.get("n", 1))]
    # Two tokens may have the same text (half a character each); ids tell them apart.
    unique = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    body = {"stream": True, "temperature": 0.0, **unique, **body}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for event in events(response):
            for choice in event["choices"]:
                answers[choice["index"]].add(choice)
    return answers


async def complete_all(url: str, bodies: list[dict[str, Any]]) -> list[list[Answer]]:
    """All of them at once."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await asyncio.gather(*(complete(session, url, body) for body in bodies))


async def get_json(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        body: dict[str, Any] = await response.json()
        return body


async def post_json(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """A completion that is not streamed; it has to succeed."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json={"model": "tiny", **body}) as response,
    ):
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def until_idle(url: str, deadline_s: float = 20.0) -> dict[str, Any]:
    """The ledger once it says idle; fails with the ledger if it does not in time."""
    deadline = time.monotonic() + deadline_s
    while True:
        ledger = await get_json(f"{url}/debug/ledger")
        if ledger["idle"]:
            return ledger
        assert time.monotonic() < deadline, ledger
        await asyncio.sleep(0.05)


def wait_gone(processes: list[psutil.Process], deadline_s: float = 10.0) -> list[psutil.Process]:
    """Those that still live after the deadline."""
    _, alive = psutil.wait_procs(processes, timeout=deadline_s)
    return list(alive)
