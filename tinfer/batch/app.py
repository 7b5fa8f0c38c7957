"""`tinfer batch` from its options to its exit code: the files, the server, the requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

import msgspec
import uvloop
from msgspec import Struct
from tqdm import tqdm

from tinfer.batch import requests, results
from tinfer.batch.asking import Asker, ServerGone, Work, write_bad_lines
from tinfer.batch.lines import Result
from tinfer.batch.requests import Skipped, Survey
from tinfer.batch.results import Results
from tinfer.batch.summary import Summary, Tally, summary_of, text_of
from tinfer.client import AsyncClient, Usage
from tinfer.errors import StartError
from tinfer.own_server import OwnServer

EXIT_OK = 0
EXIT_FAILED = 1
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BatchOptions(Struct, frozen=True, kw_only=True):
    """What the command line says; with `base_url` None a server is started with `serve_words`."""

    input: str
    output: Path
    base_url: str | None
    api_key: str | None
    serve_words: tuple[str, ...]
    max_concurrency: int
    max_retries: int
    request_timeout_s: float
    retry_failed: bool
    json_path: str | None
    show_progress: bool


class Server(Struct, frozen=True):
    """The one that is asked; the last two tell of one that was started here."""

    url: str
    api_key: str | None
    pid: int | None = None
    why_gone: Callable[[], str | None] = lambda: None


class Ended(Struct, frozen=True):
    """Why a run ended before its last line: a signal, or the server, which `why` tells of."""

    signal: signal.Signals | None = None
    why: str | None = None


class Book:
    """Where each result goes: the output, the counts, and the progress bar on standard error."""

    def __init__(self, record: Results, bar: tqdm[NoReturn]) -> None:
        self.tally = Tally()
        self._record = record
        self._bar = bar

    def add(self, result: Result, usage: Usage | None) -> None:
        """Raises `OSError` where it cannot be written."""
        self._record.write(result)
        self.tally.count(result.is_answer, usage)
        self._bar.set_postfix(failed=self.tally.num_failed, refresh=False)
        self._bar.update(1)


def run(options: BatchOptions) -> int:
    """Send what has no result yet; returns the exit code.

    0: every line is answered; 1: some are not; 128 and the number of a signal that ended it.
    Raises `StartError` and `TinferClientError` where nothing can be sent, `OSError` of the files.
    """
    _leave_on_signals()
    with (
        requests.opened(options.input) as file,
        results.opened(_output(options), options.retry_failed) as record,
    ):
        counts = requests.survey(file, record)
        ended, tally, duration_s = _carried_out(options, file, record, counts)
    summary = summary_of(counts, tally, duration_s, interrupted=ended.signal is not None)
    _report(options, summary, ended)
    if ended.signal is not None:
        return 128 + ended.signal
    return EXIT_OK if summary.num_answered == summary.num_requests else EXIT_FAILED


def _carried_out(
    options: BatchOptions, file: BinaryIO, record: Results, counts: Survey
) -> tuple[Ended, Tally, float]:
    """How it ended, what came of it, and its seconds from the first request on."""
    work = (line for line in requests.sorted_out(file, record) if not isinstance(line, Skipped))
    nobody: contextlib.nullcontext[None] = contextlib.nullcontext()
    with _server(options) if counts.num_to_send else nobody as server:
        began_s = time.monotonic()
        with tqdm(
            total=counts.num_requests,
            initial=counts.num_skipped,
            desc="requests",
            unit="req",
            file=sys.stderr,
            disable=not options.show_progress,
        ) as bar:
            book = Book(record, bar)
            if server is None:
                write_bad_lines(work, book.add)
                return Ended(), book.tally, 0.0
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                ended = runner.run(_ask_until_ended(options, server, work, book))
        duration_s = time.monotonic() - began_s
        # The loop has put the defaults in place of what it was told to catch.
        _leave_on_signals()
        if ended.why is not None:
            ended = Ended(why=server.why_gone() or ended.why)
        return ended, book.tally, duration_s


@contextlib.contextmanager
def _server(options: BatchOptions) -> Iterator[Server]:
    if options.base_url is not None:
        yield Server(options.base_url, options.api_key)
        return
    key = secrets.token_urlsafe(32)
    with OwnServer(options.serve_words, _say, {"TINFER_API_KEY": key}) as own:
        yield Server(own.url, key, own.pid, own.why_gone)


async def _ask_until_ended(options: BatchOptions, server: Server, work: Work, book: Book) -> Ended:
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in ENDING:
        loop.add_signal_handler(number, stop, number)
    asking = loop.create_task(_ask(options, server, work, book))
    watching = loop.create_task(_until_gone(server.pid))
    try:
        ends: set[asyncio.Future[Any]] = {asking, watching, stopped}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            return Ended(signal=stopped.result())
        if not asking.done():
            return Ended(why="the server has ended")
        asking.result()
        return Ended()
    except ServerGone as gone:
        return Ended(why=str(gone))
    finally:
        for task in (asking, watching):
            task.cancel()
        await asyncio.wait({asking, watching})
        for number in ENDING:
            loop.remove_signal_handler(number)


async def _ask(options: BatchOptions, server: Server, work: Work, book: Book) -> None:
    try:
        client = AsyncClient(
            server.url,
            server.api_key,
            timeout_s=options.request_timeout_s,
            max_retries=options.max_retries,
            max_connections=options.max_concurrency,
        )
    except ValueError as error:
        raise StartError(str(error)) from error
    async with client:
        # So that a wrong address or key is one line, and not as many failures as there are lines.
        await client.models()
        await Asker(client, book.add).ask_all(work, options.max_concurrency)


async def _until_gone(pid: int | None) -> None:
    """Returns once this process is dead; never where there is none to watch."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    if pid is None:
        await gone.wait()
        return
    descriptor = os.pidfd_open(pid)
    try:
        loop.add_reader(descriptor, gone.set)
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _output(options: BatchOptions) -> Path:
    """Raises `StartError` where the results would go into the requests."""
    path = options.output
    if path.exists() and options.input != requests.STANDARD_INPUT:
        if path.samefile(options.input):
            raise StartError(f"{path} is the input; the results need a file of their own")
    return path


def _leave_on_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, _: FrameType | None) -> None:
    """Once: what is open is closed on the way out, and a second signal must not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - how far the start is, as in a chat


def _report(options: BatchOptions, summary: Summary, ended: Ended) -> None:
    text = msgspec.json.format(msgspec.json.encode(summary), indent=2).decode() + "\n"
    if options.json_path == "-":
        sys.stdout.write(text)
    else:
        sys.stdout.write(text_of(summary))
        if options.json_path is not None:
            Path(options.json_path).write_text(text)
    if ended.why is not None:
        _say(f"tinfer: {ended.why}")
    if summary.num_open:
        _say("tinfer: the same command again sends what is open")
