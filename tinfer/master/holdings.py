"""What the processes of this server hold of the system right now: levels to watch, not accounts.

Linux tells all of it in /proc and /dev/shm; what cannot be read (a process that has just ended) is
left out.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinfer.cgroup import PROC

SHM = Path("/dev/shm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def holdings(workers: Mapping[str, int | None], run_name: str) -> dict[str, Any]:
    """`tasks` of the master's loop; `fds` and `rss_bytes` of the master and of each worker that is
    up, by id; `shared_memory_files` in /dev/shm that are named after this run.

    `workers` are their process ids, `run_name` the name of the run directory. Must be called on
    the loop.
    """
    pids = {"master": os.getpid(), **{name: pid for name, pid in workers.items() if pid}}
    seen = {name: _process(pid) for name, pid in pids.items()}
    return {
        "tasks": len(asyncio.all_tasks()),
        "processes": {name: one for name, one in seen.items() if one is not None},
        "shared_memory_files": sum(
            name.removeprefix("sem.").startswith(f"{run_name}.") for name in _names(SHM)
        ),
    }


def _process(pid: int) -> dict[str, int] | None:
    try:
        num_fds = len(os.listdir(PROC / str(pid) / "fd"))
        num_pages = int((PROC / str(pid) / "statm").read_text().split()[1])
    except OSError:
        return None
    return {"fds": num_fds, "rss_bytes": num_pages * _PAGE_BYTES}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
