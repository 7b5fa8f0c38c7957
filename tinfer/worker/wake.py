"""How whoever has news for a worker's loop makes it look: a pipe, opened by its path.

Copies end and ranks die on other threads and, with tensor parallelism, in other processes. The path
through /proc serves forked and spawned ones alike.
"""

from __future__ import annotations

import contextlib
import os


class WakePipe:
    """The loop's end: `fd` becomes readable, `clear` makes it wait again."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self._write_fd}"

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 1 << 16)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write_fd)


class Waker:
    """The other end; any thread may call it. Raises `OSError` where the worker is gone already."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __call__(self) -> None:
        # A full pipe holds wakes enough, and a loop that has closed it looks no more.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, b"\0")

    def close(self) -> None:
        os.close(self._fd)
