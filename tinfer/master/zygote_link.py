"""The master's hold on the zygote: process, control socket, and the lifeline of all workers."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from tinfer.config import ServeConfig
from tinfer.errors import WorkerCannotStart
from tinfer.master.limits import limit_workers
from tinfer.master.rundir import TEMP_NAME
from tinfer.wire.control import Control, Fork, FrameReader, WorkerSpec, pack

log = logging.getLogger(__name__)

_RECV_BYTES = 1 << 16
# Kernels that oneDNN keeps per CPU worker, one per matrix shape (about 0.25 MB). With its own 1024
# a prefill worker, which meets new chunk sizes all the time, grew by 30 MB per 500 prompts; with 64
# it stays level, and the same prompts took 9 % longer (November 2026, two AMD EPYC cores, one run).
ONEDNN_KERNELS = 64


class Lifeline:
    """A pipe whose write end only the master has; every worker ends when it closes."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent."""
        for name in ("read_fd", "_write_fd"):
            if (fd := getattr(self, name)) >= 0:
                os.close(fd)
                setattr(self, name, -1)


class ZygoteLink:
    """One zygote process. `on_message` gets its reports, `on_exit` is called once at its end."""

    def __init__(
        self,
        config: ServeConfig,
        run_dir: Path,
        lifeline: Lifeline,
        on_message: Callable[[Control], None],
        on_exit: Callable[[], None],
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._frames = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._socket, child = socket.socketpair()
        self._log_path = (Path(config.log_dir) if config.log_dir else run_dir) / "zygote.log"
        try:
            with self._log_path.open("ab") as log_file:
                self._process = subprocess.Popen(
                    _command(config, run_dir, child.fileno(), lifeline.read_fd),
                    pass_fds=[child.fileno(), lifeline.read_fd],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    env=_environment(config, run_dir),
                    start_new_session=True,
                )
            limit_workers(self._process.pid)
        except OSError as error:
            self._socket.close()
            raise WorkerCannotStart(f"cannot start the import process: {error}") from error
        finally:
            child.close()
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._readable)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, spec: WorkerSpec) -> None:
        """Order a worker. The frame is small and the socket private, so the send never blocks long;
        a zygote that has just died makes it a no-op, and `on_exit` follows."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.setblocking(True)
            try:
                self._socket.sendall(pack(Fork(spec)))
            finally:
                self._socket.setblocking(False)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_RECV_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._loop.remove_reader(self._socket)
            self._on_exit()
            return
        try:
            messages = self._frames.feed(data)
        except (ValueError, msgspec.DecodeError):
            log.exception("broken control frame")
            return
        for message in messages:
            self._on_message(message)

    async def close(self, timeout_s: float) -> None:
        """Close the control socket, which ends the zygote, and wait; kill it if it is late."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        try:
            await asyncio.wait_for(asyncio.to_thread(self._process.wait), timeout_s)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)

    def last_line(self) -> str:
        """The end of its log, which after an error says what it was."""
        try:
            lines = self._log_path.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def reap(self) -> int:
        """Wait for a process that has already closed its socket; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._socket.close()
        return self._process.wait()


def _command(config: ServeConfig, run_dir: Path, control_fd: int, lifeline_fd: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tinfer.worker",
        "--control",
        str(control_fd),
        "--lifeline",
        str(lifeline_fd),
        "--run-dir",
        str(run_dir),
        "--engine",
        config.engine,
    ]


def _environment(config: ServeConfig, run_dir: Path) -> dict[str, str]:
    """The workers' environment. One OpenMP thread per worker keeps the import process at one
    thread, so that it can fork, and keeps a worker's results independent of the batch."""
    environment = dict(os.environ)
    # An engine leaves files there (`vllm_dist_*`, which torch's FileStore removes only in its
    # destructor) and a worker ends without destructors; so they go with the run directory. The one
    # cache that by default is in the temporary directory stays where it is kept.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", _inductor_cache())
    environment["TMPDIR"] = str(run_dir / TEMP_NAME)
    environment["OMP_NUM_THREADS"] = "1"
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_KERNELS))
    # A value from the user's shell would override `--kv-cache-memory-bytes`, in whole GiB.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    environment.setdefault("VLLM_LOGGING_LEVEL", "DEBUG" if config.verbose else "INFO")
    return environment


def _inductor_cache() -> str:
    """Where torch would keep compiled kernels (`default_cache_dir` in torch/_inductor, 2.13)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without an account, as in many containers
        user = f"uid_{os.getuid()}"
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user.replace(os.sep, '_')}")
