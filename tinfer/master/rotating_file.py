"""A file of lines that is put aside when it is full: FILE, then FILE.1, FILE.2 and so on.

What it cannot write whole is not in it: after a write that failed half-way it ends where it did.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

PRIVATE = 0o600
# Of a writer that was killed, the last line may be torn; longer ones are read in such pieces.
_PIECE_BYTES = 65536


class RotatingFile:
    """Appends to `path`, for this user only, and begins a new one before it is over `max_bytes`;
    `num_kept` full ones are kept, the latest as `path`.1. Raises `OSError` where it cannot be
    opened, `BlockingIOError` where another process writes it."""

    def __init__(self, path: Path, max_bytes: int, num_kept: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._num_kept = num_kept
        self._fd = -1
        self._open()

    def write(self, lines: Sequence[bytes]) -> None:
        """Append lines, each with its newline. Raises `LinesLost` where not all could be."""
        done = 0
        try:
            while done < len(lines):
                if self._is_file and self._num_bytes and not self._fits(lines[done]):
                    self._rotate()
                num = self._num_that_fit(lines[done:])
                self._append(b"".join(lines[done : done + num]))
                done += num
        except OSError as error:
            raise LinesLost(error, len(lines) - done) from error

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self._fd = os.open(self._path, flags, PRIVATE)
        try:
            found = os.fstat(self._fd)
            self._is_file = stat.S_ISREG(found.st_mode)
            self._num_bytes = found.st_size if self._is_file else 0
            if self._is_file:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fchmod(self._fd, PRIVATE)
                self._cut_torn_line()
        except OSError:
            self.close()
            raise

    def _cut_torn_line(self) -> None:
        """A line without its end is of a writer that was killed, and nobody can read it."""
        end = self._num_bytes
        while end > 0:
            start = max(0, end - _PIECE_BYTES)
            place = os.pread(self._fd, end - start, start).rfind(b"\n")
            end = start + place + 1
            if place >= 0:
                break
        if end < self._num_bytes:
            os.ftruncate(self._fd, end)
            self._num_bytes = end

    def _fits(self, line: bytes) -> bool:
        return self._num_bytes + len(line) <= self._max_bytes

    def _num_that_fit(self, lines: Sequence[bytes]) -> int:
        """How many go into this file, at least one."""
        if not self._is_file:
            return len(lines)
        left = self._max_bytes - self._num_bytes
        for num, line in enumerate(lines):
            left -= len(line)
            if left < 0:
                return max(1, num)
        return len(lines)

    def _append(self, data: bytes) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError:
            if done and self._is_file:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._num_bytes)
            raise
        self._num_bytes += len(data)

    def _rotate(self) -> None:
        for number in range(self._num_kept, 0, -1):
            older = self._path if number == 1 else self._aside(number - 1)
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, self._aside(number))
        full = self._fd
        self._open()
        os.close(full)

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


class LinesLost(Exception):
    """The last `num` lines of a write are not in the file, because of `error`."""

    def __init__(self, error: OSError, num: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.num = num
