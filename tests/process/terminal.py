"""A program on a terminal of its own: what it writes is read as a person would see it come."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

DEADLINE_S = 30.0
CTRL_C, CTRL_D = "\x03", "\x04"
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Program:
    """One process that leads the session of a pseudo-terminal, 100 columns wide."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "TERM": "xterm"},
            # Or Ctrl-C on the terminal would reach nobody.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._read = ""
        self._num_seen = 0

    @property
    def written(self) -> str:
        """Everything written so far, as the terminal got it."""
        return self._read

    @property
    def screen(self) -> str:
        """Everything written so far, without the terminal's control sequences."""
        return _ESCAPES.sub("", self._read)

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed, as it does for a shell."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def resize(self, num_columns: int) -> None:
        """Make the terminal another number of columns wide, as a person does with its window."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, num_columns, 0, 0))

    def type(self, text: str) -> None:
        """Keys as they are."""
        os.write(self._master, text.encode())

    def line(self, text: str) -> None:
        """A line and the Enter key."""
        self.type(text + "\r")

    def see(self, text: str) -> str:
        """Wait until `text` appears behind what was seen before; returns what came before it."""
        deadline = time.monotonic() + DEADLINE_S
        while (at := self.screen.find(text, self._num_seen)) < 0:
            assert self._more(deadline), f"{text!r} never came:\n{self.screen}"
        before = self.screen[self._num_seen : at]
        self._num_seen = at + len(text)
        return before

    def wait_end(self) -> int:
        """The exit code; reads what is written until the end, or the program would wait."""
        deadline = time.monotonic() + DEADLINE_S
        while self._more(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)

    def _more(self, deadline: float) -> bool:
        """Wait for something new to be written; false at the end or the deadline."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            self._read += os.read(self._master, 65536).decode(errors="replace")
        except OSError:
            # Linux says so when the last descriptor of the other side is closed.
            return False
        return True


@contextlib.contextmanager
def on_terminal(folder: Path, *arguments: str) -> Iterator[Program]:
    """A running program, killed at the end if it still is."""
    program = Program(folder, *arguments)
    try:
        yield program
    finally:
        program.close()
