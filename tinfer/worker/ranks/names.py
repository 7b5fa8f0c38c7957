"""Names that a tensor-parallel worker's processes leave in /dev/shm and in the run directory.

vLLM links a worker to its ranks by named shared memory, semaphores and sockets. A killed process
removes none of them, and Python's own helper for that is a process which can be killed as well. So
every such name starts with the run directory's name and the worker's process id: whoever sees the
worker dead can remove exactly its names. Nothing here imports torch or vllm.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from multiprocessing import process, resource_tracker, shared_memory
from pathlib import Path
from typing import Any

from tinfer.wire.control import unfinished

SHM = Path("/dev/shm")


def name_prefix(run_dir: Path, pid: int) -> str:
    """How all names of the worker with this process id begin."""
    return f"{run_dir.name}.{pid}."


def worker_folder(run_dir: Path, pid: int) -> Path:
    """Where that worker keeps sockets and files that only it and its ranks use."""
    return run_dir / str(pid)


def use_prefix(prefix: str) -> None:
    """From now on this process, and what it forks, names shared memory and semaphores that way,
    and does not start Python's resource tracker for them."""
    memory: Any = shared_memory
    tracker: Any = resource_tracker
    memory._make_filename = lambda: f"/{prefix}{secrets.token_hex(8)}"
    configured: Any = process.current_process()
    configured._config["semprefix"] = f"/{prefix}"
    tracker.register = tracker.unregister = _ignore


def _ignore(name: str, kind: str) -> None:
    """Stands in for the resource tracker's two calls."""


def unlink_names(prefix: str) -> None:
    """Remove the names, not the memory: what is mapped stays mapped. Missing ones are ignored."""
    if not SHM.is_dir():
        return
    for entry in os.listdir(SHM):
        if entry.removeprefix("sem.").startswith(prefix):
            with contextlib.suppress(FileNotFoundError):
                (SHM / entry).unlink()


def forget_worker(run_dir: Path, pid: int) -> None:
    """Remove every name of a worker that has ended, with all of its ranks."""
    unlink_names(name_prefix(run_dir, pid))
    shutil.rmtree(worker_folder(run_dir, pid), ignore_errors=True)


def forget_all(run_dir: Path) -> None:
    """Remove the run directory, also half made, and every name of any worker of it."""
    for path in (unfinished(run_dir), run_dir):
        shutil.rmtree(path, ignore_errors=True)
    unlink_names(f"{run_dir.name}.")
