"""The terminal while a live view is on it. At the end, however that comes, all is as before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LEAVE = b"qQ"


class Screen:
    """The other screen of the terminal, and keys of which each counts as it is pressed.

    Lives on the running loop, whose signal handlers it has; keys are read where standard input is a
    terminal. Ctrl-Z gives the terminal back until the program goes on.
    """

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._keys = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._cooked: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._left: asyncio.Future[int] = self._loop.create_future()

    def __enter__(self) -> Self:
        for number in _ENDS:
            self._loop.add_signal_handler(number, self._leave, 128 + number)
        self._loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        self._loop.add_signal_handler(signal.SIGWINCH, self._live.refresh)
        if self._keys is not None:
            self._cooked = termios.tcgetattr(self._keys)
            self._loop.add_reader(self._keys, self._read)
        self._take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A terminal that has gone takes nothing back.
        with contextlib.suppress(OSError, termios.error):
            self._give_back()
        if self._keys is not None:
            self._loop.remove_reader(self._keys)
        for number in (*_ENDS, signal.SIGTSTP, signal.SIGWINCH):
            self._loop.remove_signal_handler(number)

    @property
    def hint(self) -> str:
        """How to leave."""
        return "Ctrl-C leaves" if self._keys is None else "q or Ctrl-C leaves"

    async def left(self) -> int:
        """The exit code, once the user wants to leave: 0 by a key, 128 and its number by a
        signal."""
        return await self._left

    def show(self, picture: RenderableType) -> None:
        """From now on, in place of what was shown."""
        self._live.update(picture, refresh=True)

    def _take(self) -> None:
        if self._keys is not None:
            tty.setcbreak(self._keys)
        self._live.start(refresh=True)

    def _give_back(self) -> None:
        try:
            self._live.stop()
        finally:
            if self._keys is not None:
                termios.tcsetattr(self._keys, termios.TCSADRAIN, self._cooked)

    def _suspend(self) -> None:
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()

    def _leave(self, code: int) -> None:
        if not self._left.done():
            self._left.set_result(code)

    def _read(self) -> None:
        assert self._keys is not None
        try:
            typed = os.read(self._keys, 1024)
        except OSError:
            typed = b""
        if not typed:
            self._loop.remove_reader(self._keys)
        elif any(key in typed for key in _LEAVE):
            self._leave(0)
