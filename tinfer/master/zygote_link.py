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
from typing import BinaryIO

from tinfer.config import ServeConfig
from tinfer.errors import WorkerCannotStart
from tinfer.master.keys import VARIABLES
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
    """One zygote process. `on_message` gets its reports, `on_exit` is called once at its end.

    The run directory need not be there yet: the zygote is to be there before it, so as to remove it
    whenever the master dies.
    """

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
        self._last_line = ""
        self._loop = asyncio.get_running_loop()
        self._socket, child = socket.socketpair()
        try:
            self._log = _open_log(config.log_dir)
            self._process = subprocess.Popen(
                _command(config, run_dir, child.fileno(), lifeline.read_fd),
                pass_fds=[child.fileno(), lifeline.read_fd],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
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
        except ValueError as error:
            log.error("the import process is given up: %s", error)
            self._loop.remove_reader(self._socket)
            self._on_exit()
            return
        for message in messages:
            self._on_message(message)

    def kill(self) -> None:
        """End it at once; `on_exit` follows."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)

    async def close(self, timeout_s: float) -> None:
        """Close the control socket, which ends the zygote, and wait; kill it if it is late."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._log.close()
        try:
            await asyncio.wait_for(asyncio.to_thread(self._process.wait), timeout_s)
        except TimeoutError:
            self.kill()
            await asyncio.to_thread(self._process.wait)

    def last_line(self) -> str:
        """The end of the log of one that was reaped, which after an error says what it was."""
        return self._last_line

    def reap(self) -> int:
        """Wait for a process that has already closed its socket; returns its exit status."""
        self.kill()
        self._socket.close()
        status = self._process.wait()
        with self._log:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
        self._last_line = lines[-1] if lines else ""
        return status


def _open_log(log_dir: str | None) -> BinaryIO:
    """Where the zygote writes; what nobody asked to keep has no name, and so leaves nothing."""
    if log_dir is not None:
        return (Path(log_dir) / "zygote.log").open("a+b")
    return os.fdopen(os.memfd_create("zygote.log"), "w+b")


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
        *([] if config.uds is None else ["--uds", config.uds]),
    ]


def _environment(config: ServeConfig, run_dir: Path) -> dict[str, str]:
    """The workers' environment. One OpenMP thread per worker keeps the import process at one
    thread, so that it can fork, and keeps a worker's results independent of the batch. API keys are
    the master's alone."""
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES}
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
