"""One process that imports torch and vLLM once and forks every worker from there.

Importing is most of a worker's start-up, so a fork (and a restart after a death) costs a fraction
of a fresh process. Forking is safe only while this process has a single thread and no CUDA context;
that is checked before each fork, and where it does not hold the worker is spawned instead.

The zygote also outlives the workers. It ends what a dead worker leaves behind, its ranks and the
names of their shared memory. When the master is gone it waits for the workers, ends those that do
not end by themselves, and removes the run directory last, and the Unix socket of a server that was
killed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from tinfer.unix_socket import remove_dead
from tinfer.wire.control import (
    CannotFork,
    Control,
    Exited,
    Fork,
    Forked,
    FrameReader,
    Imported,
    WorkerSpec,
    send,
)
from tinfer.worker.prctl import adopt_orphans
from tinfer.worker.ranks.names import forget_all, forget_worker

# How long workers have to leave by themselves once the master is gone. They notice within
# milliseconds and then just exit, so the kill takes nothing from those that are late: a worker that
# still builds its engine, or is stuck in a system call or a kernel.
ORPHAN_GRACE_S = 0.5
_RECV_BYTES = 1 << 16


class Zygote:
    """The single-threaded loop: fork on order, reap, report, and clean up at the end."""

    def __init__(
        self,
        control: socket.socket,
        lifeline: int,
        run_dir: Path,
        engine: Literal["vllm", "fake"],
        uds: str | None,
    ) -> None:
        self._control = control
        self._lifeline = lifeline
        self._run_dir = run_dir
        self._engine = engine
        self._uds = uds
        self._children: set[int] = set()
        self._frames = FrameReader()
        self._child_read, self._child_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> None:
        """Serve until the master closes its end of the control socket or of the lifeline."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._child_write, warn_on_full_buffer=False)
        adopt_orphans()  # ranks whose worker has died
        started = time.monotonic()
        self._let_lifeline_interrupt()
        gc.disable()  # imports make millions of objects and hardly any garbage
        _import_engine(self._engine)
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # from here on the loop watches the lifeline
        gc.freeze()  # the children share these objects; collecting them would copy their pages
        gc.enable()
        self._report(Imported(time.monotonic() - started))
        while self._serve_once():
            pass
        self._end_children()
        self._forget_all()

    def _forget_all(self) -> None:
        forget_all(self._run_dir)
        if self._uds is not None:
            remove_dead(self._uds)

    def _let_lifeline_interrupt(self) -> None:
        """The imports take seconds in which nothing can select: a master that dies or gives up
        meanwhile ends this process by a signal from the pipe."""
        signal.signal(signal.SIGIO, lambda _number, _frame: self._abandon())
        fcntl.fcntl(self._lifeline, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self._lifeline, fcntl.F_GETFL)
        fcntl.fcntl(self._lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
        if select.select([self._lifeline], [], [], 0)[0]:
            self._abandon()

    def _abandon(self) -> None:
        self._forget_all()
        os._exit(0)

    def _serve_once(self) -> bool:
        watched: list[Any] = [self._control, self._lifeline, self._child_read]
        readable, _, _ = select.select(watched, [], [])
        if self._child_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._child_read, _RECV_BYTES)
            self._reap()
        if self._lifeline in readable:
            return False
        if self._control in readable:
            data = self._heard()
            if not data:
                return False
            for message in self._frames.feed(data):
                if isinstance(message, Fork):
                    self._start(message.spec)
        return True

    def _heard(self) -> bytes:
        """What the master has sent; nothing once it is gone. One that dies before it has read all
        reports resets the connection, maybe before the lifeline tells."""
        try:
            return self._control.recv(_RECV_BYTES)
        except ConnectionResetError:
            return b""

    def _start(self, spec: WorkerSpec) -> None:
        if reason := _misfit(spec):
            self._report(CannotFork(spec.worker_id, spec.generation, reason))
            return
        obstacle = _fork_obstacle()
        pid = self._fork(spec) if obstacle is None else self._spawn(spec)
        self._children.add(pid)
        self._report(Forked(spec.worker_id, spec.generation, pid, obstacle is None, obstacle or ""))

    def _fork(self, spec: WorkerSpec) -> int:
        pid = os.fork()
        if pid:
            return pid
        signal.set_wakeup_fd(-1)
        self._control.close()
        os.close(self._child_read)
        os.close(self._child_write)
        from tinfer.worker.process import run_worker

        run_worker(spec, self._lifeline)

    def _spawn(self, spec: WorkerSpec) -> int:
        """A fresh interpreter for this worker. Its exit is reaped by pid like any other child's."""
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tinfer.worker",
                "--spec",
                msgspec.json.encode(spec).decode(),
                "--lifeline",
                str(self._lifeline),
            ],
            pass_fds=[self._lifeline],
            close_fds=True,
        )
        process.returncode = 0  # reaped here, not by Popen
        return process.pid

    def _reap(self) -> None:
        """Reap workers, and orphans of dead ones, that have ended by now."""
        while True:
            try:
                # Not reaped yet, so that no other process can have got its number.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in self._children:
                self._bury(ended.si_pid)
            else:
                os.waitpid(ended.si_pid, 0)

    def _bury(self, pid: int) -> None:
        """Reap a worker that has ended or is about to, end its ranks, and remove their names."""
        with contextlib.suppress(ProcessLookupError):  # it died before it had its own session
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self._children.discard(pid)
        self._report(Exited(pid, os.waitstatus_to_exitcode(status)))
        with contextlib.suppress(ChildProcessError):
            while True:  # this process is their parent now
                os.waitpid(-pid, 0)
        forget_worker(self._run_dir, pid)

    def _report(self, message: Control) -> None:
        with contextlib.suppress(OSError):  # the master may be gone; the loop sees that next
            send(self._control, message)

    def _end_children(self) -> None:
        deadline = time.monotonic() + ORPHAN_GRACE_S
        while self._children and time.monotonic() < deadline:
            select.select([self._child_read], [], [], 0.05)
            with contextlib.suppress(BlockingIOError):
                os.read(self._child_read, _RECV_BYTES)
            self._reap()
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in list(self._children):
            self._bury(pid)


def _import_engine(engine: Literal["vllm", "fake"]) -> None:
    """Import what the workers will need, and nothing that starts a thread or a CUDA context."""
    if engine == "fake":
        import tinfer.worker.fake_engine  # noqa: F401
        import tinfer.worker.process  # noqa: F401

        return
    from tinfer.worker.preload import preload

    preload()


def _misfit(spec: WorkerSpec) -> str | None:
    """Why vLLM cannot take the engine arguments, found out once here instead of in every worker."""
    if spec.engine == "fake":
        return None
    from tinfer.worker.engine_arguments import UnfitArgument, converted, engine_hints

    try:
        converted(spec.engine_args, engine_hints())
    except UnfitArgument as error:
        return str(error)
    return None


def _fork_obstacle() -> str | None:
    """Why a fork would not be safe now, or None."""
    num_tasks = len(os.listdir("/proc/self/task"))
    if num_tasks != 1:
        return f"the import process has {num_tasks} threads"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the import process holds a CUDA context"
    if "microsoft" in os.uname().release.lower():
        return "WSL"
    return None


def main() -> None:
    """Entry of `python -m tinfer.worker`; all arguments come from the supervisor."""
    parser = argparse.ArgumentParser(prog="python -m tinfer.worker")
    parser.add_argument("--control", type=int, help="descriptor of the control socket")
    parser.add_argument("--lifeline", type=int, required=True, help="pipe that the master holds")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--uds", help="the server's own socket, which goes with it")
    parser.add_argument("--engine", choices=["vllm", "fake"], default="vllm")
    parser.add_argument("--spec", help="run this one worker instead (JSON)")
    arguments = parser.parse_args()
    if arguments.spec is not None:
        from tinfer.worker.process import run_worker

        run_worker(msgspec.json.decode(arguments.spec, type=WorkerSpec), arguments.lifeline)
    control = socket.socket(fileno=arguments.control)
    Zygote(control, arguments.lifeline, arguments.run_dir, arguments.engine, arguments.uds).run()
