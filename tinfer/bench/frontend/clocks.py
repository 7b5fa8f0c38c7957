"""Processor time of a server's processes, by what they are for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Literal

import psutil
from msgspec import Struct

# front: whoever clients are connected to. engines: all that stands behind it.
Part = Literal["front", "engines"]
_API_SERVER = "APIServer"  # Source: vLLM 0.32, set_process_title in vllm/v1/utils.py
_SCHEDULED = 2  # Source: CPUCLOCK_SCHED of linux/posix-timers.h, user and system time together


class Used(Struct, frozen=True):
    """Seconds of processor time, user and system."""

    front_s: float
    engines_s: float

    @property
    def whole_s(self) -> float:
        return self.front_s + self.engines_s

    def since(self, earlier: Used) -> Used:
        return Used(self.front_s - earlier.front_s, self.engines_s - earlier.engines_s)


def process_cpu_s(pid: int) -> float:
    """What all threads of a living process have used, ended ones included, to the nanosecond.

    `/proc/PID/stat` counts in hundredths of a second. Raises `OSError` for a process that is gone.
    """
    return time.clock_gettime((~pid << 3) | _SCHEDULED)


def used(parts: Mapping[int, Part]) -> Used:
    """So far, by the process ids of `parts`. Raises `OSError` where one of them is gone."""
    sums: dict[Part, float] = {"front": 0.0, "engines": 0.0}
    for pid, part in parts.items():
        sums[part] += process_cpu_s(pid)
    return Used(sums["front"], sums["engines"])


def parts_of(front: int, family: Iterable[psutil.Process]) -> dict[int, Part]:
    """The part of each process. vLLM's further API servers are children of its first one, and
    known by the title that they give themselves."""
    return {
        process.pid: "front" if process.pid == front or _is_api_server(process) else "engines"
        for process in family
    }


def _is_api_server(process: psutil.Process) -> bool:
    return any(_API_SERVER in word for word in (process.name(), *process.cmdline()))
