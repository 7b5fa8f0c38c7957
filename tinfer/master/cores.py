"""Which CPU cores this server may pin workers to, and which of them are not another tinfer's.

A core is claimed by binding an abstract Unix socket named after it: two servers can never hold the
same name, there is no file to clean up, and the claim goes with the process however it dies. Such
names are per network namespace, so servers in different containers do not see each other.
"""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

from msgspec import Struct

from tinfer.cgroup import CGROUPS, PROC, cpu_quota


class UsableCores(Struct, frozen=True):
    """The cores that this process may run on, and how many of them it can keep busy."""

    numbers: tuple[int, ...]
    num_usable: int


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> UsableCores:
    """The affinity mask, cut by the cgroup's CPU quota to as many cores as the quota can fill."""
    numbers = tuple(sorted(os.sched_getaffinity(0)))
    quota = cpu_quota(proc, cgroups)
    if quota is None:
        return UsableCores(numbers, len(numbers))
    return UsableCores(numbers, min(len(numbers), max(1, math.ceil(quota))))


class CoreClaims:
    """The cores that this server has taken; held by the master until `close`.

    `notes` says, in whole sentences for the plan and the ready block, where cores are shared.

    Typical use by placement: `take(n)` for n single-thread workers;
    `take(num_workers, claims.num_usable)` to get as many free cores as there are, at least one
    per worker.
    """

    def __init__(self, cores: UsableCores | None = None, prefix: str = "tinfer-core-") -> None:
        cores = usable_cores() if cores is None else cores
        self.num_usable = cores.num_usable
        self.notes: list[str] = []
        self._numbers = cores.numbers
        self._prefix = prefix
        self._claims: dict[int, socket.socket] = {}
        self._borrowed: set[int] = set()

    def take(self, num_min: int, num_max: int | None = None) -> list[int]:
        """Claim up to `num_max` (default `num_min`) cores that nobody holds.

        If fewer than `num_min` are free, the rest are cores that are shared: first those of other
        servers, once each, then the ones taken here, in turn; `notes` then says so. At most
        `num_usable` different cores are taken over all calls. The result has at least `num_min`
        entries, and repeats where there are more entries than cores.
        """
        num_max = num_min if num_max is None else max(num_min, num_max)
        taken: list[int] = []
        foreign: list[int] = []
        for number in self._numbers:
            if len(taken) >= num_max or self._room <= 0:
                break
            if number not in self._claims and number not in self._borrowed:
                (taken if self._claim(number) else foreign).append(number)
        if len(taken) < num_min:
            taken += self._share(foreign, num_min - len(taken))
        return taken

    @property
    def _room(self) -> int:
        return self.num_usable - len(self._claims) - len(self._borrowed)

    def _share(self, foreign: list[int], num_wanted: int) -> list[int]:
        """So many cores that are not free; notes with whom they are shared."""
        borrowed = foreign[: min(self._room, num_wanted)]
        self._borrowed.update(borrowed)
        if borrowed:
            cores = ", ".join(map(str, borrowed))
            self.notes.append(f"too few free cores: shares core {cores} with another tinfer")
        num_left = num_wanted - len(borrowed)
        if num_left:
            self.notes.append(f"{self.num_usable} usable cores are too few: workers share them")
        in_use = sorted({*self._claims, *self._borrowed})
        return borrowed + [in_use[i % len(in_use)] for i in range(num_left)]

    def _claim(self, number: int) -> bool:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0{self._prefix}{number}")
        except OSError:
            claim.close()
            return False
        self._claims[number] = claim
        return True

    def close(self) -> None:
        """Give all of them back. Idempotent."""
        for claim in self._claims.values():
            claim.close()
        self._claims.clear()
        self._borrowed.clear()
