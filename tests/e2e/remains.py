"""What a server could leave behind, noted while it lives, so that it can be looked for later."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.e2e.serving import ServeProcess

Inode = tuple[int, int]
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Remains:
    """Processes, run directory, port (None before one is known), anonymous memory files, and what
    is named after the run directory in /dev/shm."""

    processes: list[psutil.Process]
    run_dir: Path
    port: int | None
    memory_files: frozenset[Inode]

    @classmethod
    def of(cls, server: ServeProcess) -> Remains:
        family = server.family()
        files = frozenset().union(*(_memory_files(process.pid) for process in family))
        port = int(server.url.rpartition(":")[2]) if server.url else None
        return cls(family, server.run_dir(), port, files)

    def left(self, deadline_s: float) -> list[str]:
        """Describe what still exists at the deadline; returns as soon as nothing does."""
        end = time.monotonic() + deadline_s
        while (found := self._look()) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def _look(self) -> list[str]:
        found = [f"process {p.pid}" for p in self.processes if _lives(p)]
        if self.run_dir.exists():
            found.append(f"{self.run_dir}: {sorted(p.name for p in self.run_dir.iterdir())}")
        found += [str(path) for path in SHM.iterdir() if self._is_segment(path.name)]
        if self.port is not None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    found.append(f"listener on port {self.port}")
        if (
            not found and self.memory_files
        ):  # a look at every descriptor: only when all else is gone
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
            holders = [pid for pid in pids if _memory_files(pid) & self.memory_files]
            found += [f"memory file held by process {pid}" for pid in holders]
        return found

    def _is_segment(self, name: str) -> bool:
        return name.removeprefix("sem.").startswith(f"{self.run_dir.name}.")


def _lives(process: psutil.Process) -> bool:
    """A process that has ended and waits for some init to reap it holds nothing any more."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _memory_files(pid: int) -> set[Inode]:
    found = set()
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # gone meanwhile, or another user's
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{name}").startswith("/memfd:"):
                    status = os.stat(f"{folder}/{name}")
                    found.add((status.st_dev, status.st_ino))
    return found
