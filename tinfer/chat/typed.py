"""What a user types, as whole inputs: single lines, continued lines, blocks and pastes.

`Input` is the rule; `Terminal` and `Piped` are the two places where lines come from.
"""

from __future__ import annotations

import select
import signal
import sys
from typing import Protocol, TextIO

PROMPT = "> "
CONTINUED = ". "
QUOTES = '"""'
# A paste arrives in one go, a person's next line does not.
PASTE_GAP_S = 0.05
# Python looks for signals when one interrupts its wait for a key. One that came just before that
# wait would stay unseen until a key comes; an alarm interrupts it again.
SIGNAL_CHECK_S = 0.5


class Source(Protocol):
    """Where questions and commands come from."""

    def read(self) -> str:
        """The next input. Raises `EOFError` at the end, `KeyboardInterrupt` on Ctrl-C."""
        ...


class Input:
    """Puts lines together until they are a whole input.

    A line that ends in a backslash goes on in the next one; three double quotes begin a block,
    which they also end.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._in_block = False

    @property
    def is_open(self) -> bool:
        """Whether more has to come."""
        return bool(self._parts) or self._in_block

    def feed(self, line: str) -> str | None:
        """Add a line, or several of a paste; returns the whole input when it is one."""
        if not self.is_open and line.lstrip().startswith(QUOTES):
            self._in_block = True
            line = line.lstrip().removeprefix(QUOTES)
        if self._in_block:
            if line.rstrip().endswith(QUOTES):
                self._in_block = False
                return self._whole(line.rstrip().removesuffix(QUOTES)).strip("\n")
            self._parts.append(line)
            return None
        if line.endswith("\\"):
            self._parts.append(line[:-1])
            return None
        return self._whole(line)

    def _whole(self, last: str) -> str:
        parts, self._parts = self._parts, []
        return "\n".join([*parts, last])


class Terminal:
    """A person at a terminal, with the line editing and the history of readline.

    GNU readline is told by the terminal where a paste ends. libedit, which some builds of Python
    have in its place, is not: there, lines that are ready at once after another are a paste
    (`by_time`).
    """

    def __init__(self, by_time: bool | None = None) -> None:
        # Its import is what gives `input` line editing.
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
        signal.signal(signal.SIGALRM, lambda number, frame: None)
        self._by_time = "libedit" in (readline.__doc__ or "") if by_time is None else by_time

    def read(self) -> str:
        typed = Input()
        signal.setitimer(signal.ITIMER_REAL, SIGNAL_CHECK_S, SIGNAL_CHECK_S)
        try:
            while (line := typed.feed(self._lines(CONTINUED if typed.is_open else PROMPT))) is None:
                pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        return line

    def _lines(self, prompt: str) -> str:
        """One line, or all of a paste."""
        lines = [input(prompt)]
        is_command = prompt == PROMPT and lines[0].startswith("/")
        while self._by_time and not is_command and _is_ready():
            lines.append(input(CONTINUED))
        return "\n".join(lines)


def _is_ready() -> bool:
    return bool(select.select([sys.stdin], [], [], PASTE_GAP_S)[0])


class Piped:
    """A file or a pipe: one input per line, blank lines left out."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines

    def read(self) -> str:
        while line := self._lines.readline():
            if line.strip():
                return line.rstrip("\r\n")
        raise EOFError
