"""How much main memory this process may still take: the machine's, cut by its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
from msgspec import Struct

# Version 1 of control groups writes "no limit" as a number near the largest.
_NO_LIMIT_BYTES = 1 << 60


class HostMemory(Struct, frozen=True):
    """Bytes in all and bytes free; `limited_by` says whose they are."""

    total_bytes: int
    free_bytes: int
    limited_by: str = "this machine"


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """The tightest of the machine's memory and the limits (v1 or v2) of every group above us."""
    machine = psutil.virtual_memory()
    tightest = HostMemory(machine.total, machine.available)
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            names = ("memory.max", "memory.current", "inactive_file")
            groups = _groups(cgroups, path)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            groups = _groups(cgroups / "memory", path)
        else:
            continue
        for group in groups:
            limit = _limit(group, *names)
            if limit is not None and limit.free_bytes < tightest.free_bytes:
                tightest = limit
    return tightest


def _groups(root: Path, path: str) -> Iterator[Path]:
    """Our group and all above it. A container's path often names a level that is not mounted
    there; its limits are then at the root."""
    group = root / path.lstrip("/")
    for level in (group, *group.parents):
        yield level
        if level == root:
            return


def _limit(group: Path, limit_name: str, used_name: str, cache_key: str) -> HostMemory | None:
    limit, used = _text(group / limit_name).strip(), _text(group / used_name).strip()
    if not limit.isdecimal() or not used.isdecimal() or int(limit) >= _NO_LIMIT_BYTES:
        return None
    # The kernel gives cached file pages back before it refuses memory.
    cache = next(
        (
            int(line.split()[1])
            for line in _text(group / "memory.stat").splitlines()
            if line.split()[0] == cache_key
        ),
        0,
    )
    return HostMemory(int(limit), max(0, int(limit) - int(used) + cache), "this control group")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
