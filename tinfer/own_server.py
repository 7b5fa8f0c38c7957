"""The server that a program starts for itself: a child, whose output goes to a file without a name.

It ends with the program, however that ends: `stop` on the orderly ways, and where the program is
killed the kernel sends the child the signal that makes it stop. To the kernel the parent is not the
process but the thread that started the child, so that thread lives until `stop`. The child asks for
the signal itself, before it becomes the server: nothing runs between fork and exec here, where
other threads may hold any lock.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from tinfer.errors import StartError

READY = re.compile(rb"^tinfer \S+ serves \S+ on ((?:https?://|unix:)\S+)\s*$", re.MULTILINE)
# An answer that is cut at the end of the program needs no time to finish.
STOP_S = 20.0
DYING_S = 0.5
POLL_S = 0.05
MAX_LAST_WORDS = 3
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h

_Process = subprocess.Popen[bytes]


class OwnServer:
    """A running `tinfer serve` and its address. Use it as a context manager."""

    def __init__(
        self,
        arguments: Sequence[str],
        show: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it and wait until it is ready; `show` gets its progress, line by line.

        `environment` is set for the server beside what this process has; a key in it is seen by no
        other user, as it would be among the arguments. Raises `StartError` when the server ends
        before it is ready; whatever is raised, nothing is left running.
        """
        self.url = ""
        # Unlinked from the start: nobody has to clean it up, whatever happens to this process.
        self._log = tempfile.TemporaryFile()
        self._num_shown = 0
        self._over = threading.Event()
        self._process = self._kept(arguments, {**os.environ, **(environment or {})})
        try:
            self._wait_ready(show)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of its master; nobody else gets it before `stop` or `why_gone` has seen its end."""
        return self._process.pid

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
        """Let it go: asked twice, then killed; its workers end with it. Once is enough."""
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
        self._over.set()
        self._keeper.join()
        self._log.close()

    def _kept(self, arguments: Sequence[str], environment: Mapping[str, str]) -> _Process:
        """The child, started by a thread that stays until `stop`."""
        made: Future[_Process] = Future()
        log, over = self._log.fileno(), self._over

        def keep() -> None:
            try:
                made.set_result(_start(arguments, log, environment))
            except BaseException as error:  # noqa: BLE001 - told to whoever waits for it
                made.set_exception(error)
            else:
                over.wait()

        # A daemon: it must not keep a program that forgets `stop` from ending.
        self._keeper = threading.Thread(target=keep, name="tinfer-own-server", daemon=True)
        self._keeper.start()
        try:
            return made.result()
        except BaseException:
            # Its own error, or a signal just as the child begins.
            made.add_done_callback(_give_up)
            over.set()
            raise

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


def _start(arguments: Sequence[str], log: int, environment: Mapping[str, str]) -> _Process:
    # Where this program takes no modules from the current folder, the server must not either.
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m"]
    serve = [*python, "tinfer", "serve", "--port", "0", *arguments]
    # A session of its own: Ctrl-C at the terminal is for the program, not for the server.
    return subprocess.Popen(
        [*python, __name__, str(os.getpid()), *serve],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=environment,
    )


def _give_up(made: Future[_Process]) -> None:
    if made.exception() is None:
        made.result().terminate()
        made.result().wait()


def _become(parent: int, command: list[str]) -> None:
    """Turn this process into `command`, which is told to stop when `parent` is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() == parent:
        os.execv(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
