"""Runs one server and sees to its end: `python -m tinfer.bench.compare.guard COMMAND ...`.

A server under comparison has children of its own, and some of them outlive a parent that is killed.
The guard is the parent of all that come loose below it, and it reads a pipe whose other end only
the comparison holds: when that end is closed, on purpose or because the comparison died in any way,
the server is asked to stop (its front process alone, so that it can end its children in order), and
what is left after a grace is killed. The guard ends last, with the server's exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

# For the server to stop, and for its children to follow it.
GRACE_S = 15.0
REST_S = 5.0
_PR_SET_PDEATHSIG = 1  # Source of both: linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(command: Sequence[str]) -> int:
    """Run `command` until it ends or standard input does; returns its exit code.

    A server that a signal ended gives 128 and the signal's number, as in a shell.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    # Whoever signals the guard means the server, which hears of it through the pipe alone.
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)

    def become_server() -> None:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_DFL)
        # Where the guard itself is killed, at least the server's front process hears of it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    server = subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=become_server
    )
    return _watch(server.pid, woken)


def _watch(server: int, woken: int) -> int:
    """Until no descendant is left; returns the server's exit code."""
    code: int | None = None
    deadline_s: float | None = None
    asked = False
    while True:
        wait_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        ready, _, _ = select.select([woken] if asked else [0, woken], [], [], wait_s)
        if woken in ready:
            os.read(woken, 4096)
        elif not ready and deadline_s is not None:
            _signal_all(signal.SIGKILL)
            deadline_s = time.monotonic() + REST_S
        if 0 in ready and not os.read(0, 4096):
            asked = True
            # An arm that is not being measured is stopped, and could not even end.
            _signal_all(signal.SIGCONT)
            if code is None:
                deadline_s = time.monotonic() + GRACE_S
                os.kill(server, signal.SIGTERM)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == server:
                    code = os.waitstatus_to_exitcode(ended[1])
                    deadline_s = time.monotonic() + REST_S
        except ChildProcessError:
            return (code if code >= 0 else 128 - code) if code is not None else 1


def _signal_all(number: signal.Signals) -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
