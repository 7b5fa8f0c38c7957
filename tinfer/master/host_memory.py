"""How much main memory this process may still take: the machine's, cut by its control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
from msgspec import Struct

from tinfer.cgroup import CGROUPS, PROC, memory_limits


class HostMemory(Struct, frozen=True):
    """Bytes in all and bytes free; `limited_by` says whose they are."""

    total_bytes: int
    free_bytes: int
    limited_by: str = "this machine"


def host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> HostMemory:
    """The tightest of the machine's memory and the limits of every group above us."""
    machine = psutil.virtual_memory()
    tightest = HostMemory(machine.total, machine.available)
    for limit in memory_limits(proc, cgroups):
        if limit.left_bytes < tightest.free_bytes:
            tightest = HostMemory(limit.limit_bytes, limit.left_bytes, "this control group")
    return tightest
