"""`tinfer chat` from its options to its exit code: the server, the terminal, the session."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from msgspec import Struct

from tinfer.chat.asking import Asker, Wishes
from tinfer.chat.session import Session
from tinfer.chat.typed import Piped, Terminal
from tinfer.client import TinferClientError
from tinfer.errors import StartError
from tinfer.own_server import OwnServer

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# What a terminal would obey rather than show; a model may say anything.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# How a terminal writes reasoning: dim, and as usual behind it.
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class ChatOptions(Struct, frozen=True, kw_only=True):
    """What the command line says; with `url` None a server is started, with `serve_options`."""

    model: str | None
    url: str | None
    api_key: str | None
    serve_options: tuple[str, ...]
    system: str | None
    max_tokens: int | None
    temperature: float | None
    transcript: Path | None


class Terminals:
    """Standard output for answers, standard error for the rest: whoever keeps the answers does not
    want reasoning in them."""

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self._line_open = False
        self._is_thinking = False

    def show(self, text: str) -> None:
        self._end_thought()
        sys.stdout.write(_harmless(text) if self._interactive else text)
        sys.stdout.flush()
        self._line_open = True

    def think(self, text: str) -> None:
        if sys.stderr.isatty():
            text = _harmless(text)
            text = text if "NO_COLOR" in os.environ else f"{_DIM}{text}{_PLAIN}"
        sys.stderr.write(text)
        sys.stderr.flush()
        self._is_thinking = True

    def end(self) -> None:
        self._end_thought()
        if self._line_open or self._interactive:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._line_open = False

    def say(self, text: str) -> None:
        self._end_thought()
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - the terminal is its purpose

    def _end_thought(self) -> None:
        if self._is_thinking:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self._is_thinking = False


def _harmless(text: str) -> str:
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def run(options: ChatOptions) -> int:
    """Chat until the user leaves; returns the exit code. Raises `StartError`."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Terminals(interactive)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with contextlib.ExitStack() as stack:
        try:
            session = _session(options, screen, interactive, stack)
            session.run()
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return EXIT_FAILED if session.num_failed and not interactive else 0


def _leave(number: int, _: FrameType | None) -> None:
    """Once: what is open is closed on the way out, and a second signal must not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _session(
    options: ChatOptions, screen: Terminals, interactive: bool, stack: contextlib.ExitStack
) -> Session:
    wishes = Wishes(options.model if options.url else None, options.max_tokens, options.temperature)
    why_gone: Callable[[], str | None] | None = None
    began_s = time.monotonic()
    if options.url is None:
        model = () if options.model is None else (options.model,)
        server = stack.enter_context(OwnServer((*model, *options.serve_options), screen.say))
        url, why_gone = server.url, server.why_gone
    else:
        url = options.url
    try:
        asker = Asker(url, options.api_key, wishes, screen.say)
    except ValueError as error:
        raise StartError(str(error)) from error
    if interactive:
        ready = (
            None if options.url else f"its own server, ready in {time.monotonic() - began_s:.1f} s"
        )
        _greet(asker, screen, ready)
    source = Terminal() if interactive else Piped(sys.stdin)
    return Session(
        asker,
        source,
        screen,
        system=options.system,
        transcript=options.transcript,
        why_gone=why_gone,
        interactive=interactive,
    )


def _greet(asker: Asker, screen: Terminals, ready: str | None) -> None:
    try:
        served = asyncio.run(asker.models())
    except TinferClientError as error:
        screen.say(f"error: {error.message}")
    else:
        names = ", ".join(model.id for model in served)
        screen.say(f"{names} at {asker.url}" + (f" ({ready})" if ready else ""))
    screen.say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
