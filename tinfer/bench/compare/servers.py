"""The server processes of an arm: started, waited for, bound to their cores, and ended again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import aiohttp
import psutil

from tinfer.bench.compare.arms import ServerPlan, inherited
from tinfer.bench.compare.guard import GRACE_S
from tinfer.errors import StartError

_POLL_S = 0.25
_ASK_TIMEOUT_S = 5.0
_LAST_WORDS = 3
# The guard kills what is left after its grace, and is itself the last to go.
_GUARD_END_S = GRACE_S + 15.0


class Server:
    """One running server under its guard; `stop` always ends it and all that it has started."""

    def __init__(self, plan: ServerPlan, environment: Mapping[str, str], log: Path) -> None:
        """Start it. Raises `StartError` where it cannot even be run."""
        self.plan = plan
        self.log = log
        self._front: psutil.Process | None = None
        self._frozen: list[psutil.Process] = []
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # Its own modules are found as this process finds them.
        guard = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
        guard += ["-m", "tinfer.bench.compare.guard"]
        with log.open("ab") as out:  # behind what one before it has said
            out.write(f"{shlex.join(plan.argv)} --port {port}\n".encode())
            out.flush()
            self._guard = subprocess.Popen(
                [*guard, *plan.argv, "--port", str(port)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**inherited(environment), **plan.environment},
                start_new_session=True,
                preexec_fn=_binding(plan.engine_cores),
            )

    async def wait_ready(self, deadline_s: float) -> None:
        """Return once it answers and is healthy; `deadline_s` is of the monotonic clock.

        Raises `StartError` with its last words where it ends before, or is late.
        """
        timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while not await self._answers(session):
                if (code := self._guard.poll()) is not None:
                    raise StartError(f"a server did not start (exit code {code}): {self._words()}")
                if time.monotonic() > deadline_s:
                    raise StartError(f"a server was not ready in time: {self._words()}")
                await asyncio.sleep(_POLL_S)
        self._take_front()

    def why_gone(self) -> str | None:
        """One line on its end, where it has ended since it was ready."""
        if self._guard.poll() is None and self._front is not None and self._front.is_running():
            # One that its guard has not waited for yet is a zombie.
            with contextlib.suppress(psutil.NoSuchProcess):
                if self._front.status() != psutil.STATUS_ZOMBIE:
                    return None
        return f"a server ended: {self._words()}"

    def freeze(self) -> None:
        """Stop all its processes where they are, so that they use nothing. Idempotent."""
        if not self._frozen:
            self._frozen = self.family()
            self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on. Idempotent."""
        self._signal(signal.SIGCONT)
        self._frozen = []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def family(self) -> list[psutil.Process]:
        """The server and everything below it, but not the guard."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._guard.pid).children(recursive=True)
        return []

    @property
    def front_pid(self) -> int:
        """Of the process that was started, which is ready."""
        assert self._front is not None
        return self._front.pid

    def cpu_s(self) -> float:
        """Processor time of all its living processes so far."""
        total_s = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total_s += times.user + times.system
        return total_s

    def release(self) -> None:
        """Tell the guard to end it; `stop` waits for that."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()

    def stop(self) -> None:
        """End it; returns when it is gone. Idempotent."""
        self.release()
        try:
            self._guard.wait(_GUARD_END_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        for path in ("/health", "/v1/models"):
            try:
                async with session.get(self.url + path) as response:
                    if response.status != 200:
                        return False
            except (aiohttp.ClientError, TimeoutError, OSError):
                return False
        return True

    def _take_front(self) -> None:
        """Let the front process, and it alone, use all cores: its engine has started bound."""
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            self._front = next(iter(psutil.Process(self._guard.pid).children()), None)
            if self._front is not None and self.plan.front_cores is not None:
                for thread in self._front.threads():
                    os.sched_setaffinity(thread.id, self.plan.front_cores)

    def _words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        last = [line.strip() for line in lines if line.strip()][-_LAST_WORDS:]
        return " | ".join(last) + " (--log-dir keeps all of it)"


def stop_all(servers: Sequence[Server]) -> None:
    """End all of them at once."""
    for server in servers:
        server.release()
    for server in servers:
        server.stop()


def _binding(cores: tuple[int, ...] | None) -> Callable[[], None] | None:
    return None if cores is None else (lambda: os.sched_setaffinity(0, cores))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
