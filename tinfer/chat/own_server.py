"""The server that a chat starts for itself: a child, whose output goes to a file without a name.

It ends with the chat, however that ends: `stop` on the orderly ways, and where the chat is killed
the kernel sends the child the signal that makes it stop.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from tinfer.errors import StartError

READY = re.compile(rb"^tinfer \S+ serves \S+ on ((?:https?://|unix:)\S+)\s*$", re.MULTILINE)
# An answer that is cut at the end of the chat needs no time to finish.
STOP_S = 20.0
DYING_S = 0.5
POLL_S = 0.05
MAX_LAST_WORDS = 3
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


class OwnServer:
    """A running `tinfer serve` and its address. Use it as a context manager."""

    def __init__(self, arguments: Sequence[str], show: Callable[[str], None]) -> None:
        """Start it and wait until it is ready; `show` gets its progress, line by line.

        Raises `StartError` when it ends before; whatever is raised, nothing is left running.
        """
        self.url = ""
        # Unlinked from the start: nobody has to clean it up, whatever happens to this process.
        self._log = tempfile.TemporaryFile()
        self._num_shown = 0
        self._process = _start(arguments, self._log.fileno())
        try:
            self._wait_ready(show)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def why_gone(self) -> str | None:
        """One line on its end, if it has ended; asked once its connection is broken.

        A process closes its connections a moment before it is seen dead.
        """
        try:
            code = self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            return None
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        words = self._output().decode(errors="replace").split("\n")
        last = " | ".join([word.strip() for word in words if word.strip()][-MAX_LAST_WORDS:])
        return f"the server has ended with {how}; its last words: {last}"

    def stop(self) -> None:
        """Let it go: asked twice, then killed; its workers end with it."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                break
            self._process.send_signal(number)
            try:
                self._process.wait(STOP_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                # Ctrl-C while it stops means: at once.
                continue
        self._process.wait()
        self._log.close()

    def _wait_ready(self, show: Callable[[str], None]) -> None:
        while True:
            code = self._process.poll()
            output = self._output()
            ready = READY.search(output)
            self._show_lines(output[: ready.start()] if ready else output, show)
            if ready:
                self.url = ready[1].decode()
                return
            if code is not None:
                raise StartError(f"the server did not start (exit code {code})")
            time.sleep(POLL_S)

    def _show_lines(self, output: bytes, show: Callable[[str], None]) -> None:
        """What is new, as far as it is whole lines."""
        *lines, rest = output[self._num_shown :].split(b"\n")
        for line in lines:
            show(line.decode(errors="replace").rstrip())
        self._num_shown = len(output) - len(rest)

    def _output(self) -> bytes:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0)


def _start(arguments: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    # Where the chat does not look for modules in the current folder, the server must not either.
    safe_path = ["-P"] if sys.flags.safe_path else []
    # A session of its own: Ctrl-C at the terminal is for the answer, not for the server.
    return subprocess.Popen(
        [sys.executable, *safe_path, "-m", "tinfer", "serve", "--port", "0", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
