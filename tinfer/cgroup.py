"""The limits that Linux control groups, of version 1 or 2, put on this process.

Standard library only: the server, its workers and the GPU checks all ask here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# Version 1 writes "no limit" as a number near the largest.
_NO_LIMIT_BYTES = 1 << 60


class MemoryLimit(NamedTuple):
    """One group's limit, what is left under it, and the kernel's file that says so."""

    limit_bytes: int
    left_bytes: int
    file: Path


def memory_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[MemoryLimit]:
    """The memory limits of every group that this process is in, directly or not."""
    for version, group in _groups("memory", proc, cgroups):
        names = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        if (limit := _memory_limit(group, *names)) is not None:
            yield limit


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """CPU time per time that the groups leave this process, if they limit it."""
    quotas = []
    for version, group in _groups("cpu", proc, cgroups):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in names for word in read_text(group / name).split()]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            with contextlib.suppress(ValueError, ZeroDivisionError):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def read_text(path: Path) -> str:
    """What a kernel file says; nothing where this kernel or container has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[tuple[int, Path]]:
    """The version and the folder of each group from the process's own up to the root. A container's
    path often names a level that is not mounted there; its limits are then at the root."""
    for line in read_text(proc / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version, root = 2, cgroups
        elif controller in controllers.split(","):
            version, root = 1, cgroups / controller
        else:
            continue
        group = root / path.lstrip("/")
        for level in (group, *group.parents):
            yield version, level
            if level == root:
                break


def _memory_limit(
    group: Path, limit_name: str, used_name: str, cache_key: str
) -> MemoryLimit | None:
    limit, used = (read_text(group / name).strip() for name in (limit_name, used_name))
    if not limit.isdecimal() or not used.isdecimal() or int(limit) >= _NO_LIMIT_BYTES:
        return None
    # Page cache that was not used lately is given back by the kernel before it refuses memory.
    cached = (
        int(line.split()[1])
        for line in read_text(group / "memory.stat").splitlines()
        if line.split()[0] == cache_key
    )
    left = max(0, int(limit) - int(used) + next(cached, 0))
    return MemoryLimit(int(limit), left, group / limit_name)
