"""When a worker changes its role: never (off), when it has been idle (the paper), or by demand.

A flip is a change of label. From prefill to decode a worker first drains: nothing new starts on it,
and its leases are read. From decode to prefill what decodes there stays in place and ends there;
leases of a worker that prefills wait for decode workers, and those wait for nobody, so no two ever
wait for each other. There is always one able worker per phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tinfer.core.demand import Demand
from tinfer.core.fleet import Fleet
from tinfer.core.types import Role
from tinfer.core.worker import Worker

# Both sides of the analytic ratio are looked at this often.
PASS_S = 1.0


class Flip(NamedTuple):
    """That worker is to take that role, for a reason that a person can read."""

    worker: Worker
    role: Role
    reason: str


class Off:
    """Roles stay as they are."""

    def flip(self, fleet: Fleet, demand: Demand, now_s: float) -> Flip | None:
        return None


class Watchdog:
    """The paper's: a worker that was idle for `idle_s` joins the other phase, if that has work.

    Source of 60 s: arXiv 2401.11181, section 5.1 flips after one idle minute.
    """

    def __init__(self, idle_s: float = 60.0) -> None:
        self._idle_s = idle_s
        self._busy_s: dict[str, float] = {}

    def flip(self, fleet: Fleet, demand: Demand, now_s: float) -> Flip | None:
        for worker in fleet.workers:
            if not worker.is_idle:
                self._busy_s[worker.id] = now_s
            else:
                self._busy_s.setdefault(worker.id, now_s)
        for worker in fleet.staying:
            idle_s = now_s - self._busy_s[worker.id]
            if idle_s < self._idle_s or not may_leave(worker, fleet):
                continue
            other = other_role(worker.role)
            peers = [one for one in fleet.workers if one.role is other]
            if any(not one.is_idle for one in peers):
                self._busy_s[worker.id] = now_s
                return Flip(worker, other, f"idle for {idle_s:.0f} s")
        return None


class Reactive:
    """Ours: roles follow the demand, with a band, several looks and a pause before they move.

    The anchor is analytic: of `n` workers, prefill gets the part that it is of the work that
    arrives. A worker moves if the anchor differs by more than `band` workers in `num_passes` looks
    in a row, `PASS_S` apart. Decode gets no second worker within `cooldown_s` of a flip: decode
    workers are full for longer than a queue of prompts is long, and giving one back costs a drain.
    Source of the three numbers: Arrow's (as Narwhal's documents tell) 3 passes of 1 s and 10 s.
    """

    def __init__(self, band: float = 0.6, num_passes: int = 3, cooldown_s: float = 10.0) -> None:
        self._band = band
        self._num_passes = num_passes
        self._cooldown_s = cooldown_s
        self._looked_s = -PASS_S
        self._streak = 0
        self._flipped_s = -cooldown_s

    def flip(self, fleet: Fleet, demand: Demand, now_s: float) -> Flip | None:
        if now_s - self._looked_s < PASS_S:
            return None
        self._looked_s = now_s
        able = [one for one in fleet.staying if one.role in (Role.PREFILL, Role.DECODE)]
        if len(able) < 3 or any(one.flips_to is not None for one in able):
            return None
        excess = self._excess(able, demand, now_s)
        if excess is None or abs(excess) <= self._band:
            self._streak = 0
            return None
        sign = 1 if excess > 0 else -1
        self._streak = self._streak + sign if self._streak * sign >= 0 else sign
        if abs(self._streak) < self._num_passes:
            return None
        return self._moved(able, fleet, sign, excess, now_s)

    def _excess(self, able: Sequence[Worker], demand: Demand, now_s: float) -> float | None:
        """How many prefill workers there are more than demand asks for."""
        decoding = [one for one in able if one.role is Role.DECODE]
        batch = max(8, *(one.num_decoding for one in decoding), 0)
        part = demand.prefill_part(able[0].costs, batch, now_s)
        if part is None:
            return None
        wanted = min(len(able) - 1.0, max(1.0, part * len(able)))
        return sum(one.role is Role.PREFILL for one in able) - wanted

    def _moved(
        self, able: Sequence[Worker], fleet: Fleet, sign: int, excess: float, now_s: float
    ) -> Flip | None:
        source = Role.PREFILL if sign > 0 else Role.DECODE
        if source is Role.PREFILL and now_s - self._flipped_s < self._cooldown_s:
            return None
        movable = [one for one in able if one.role is source and may_leave(one, fleet)]
        if not movable:
            return None
        self._streak, self._flipped_s = 0, now_s
        worker = min(movable, key=lambda one: (one.num_seqs + one.num_held_blocks, one.id))
        more = "more" if sign > 0 else "fewer"
        reason = f"{abs(excess):.1f} {more} prefill workers than the load asks for"
        return Flip(worker, other_role(source), reason)


def other_role(role: Role) -> Role:
    return Role.DECODE if role is Role.PREFILL else Role.PREFILL


def why_not_flip(worker: Worker, role: Role, fleet: Fleet) -> str | None:
    """What keeps that worker from taking that role; None where nothing does."""
    if role not in (Role.PREFILL, Role.DECODE) or worker.role not in (Role.PREFILL, Role.DECODE):
        return "only prefill and decode workers change roles"
    if worker.is_draining:
        return "it drains to be stopped"
    if worker.flips_to is not None:
        return f"it drains to become a {worker.flips_to.value} worker"
    if worker.role is role:
        return f"it is a {role.value} worker"
    if not may_leave(worker, fleet):
        return f"it is the only {worker.role.value} worker"
    return None


def may_leave(worker: Worker, fleet: Fleet) -> bool:
    """Whether its role can spare it: another worker of it stays, and it is not on the move."""
    if worker.role not in (Role.PREFILL, Role.DECODE) or worker.flips_to is not None:
        return False
    return any(
        one is not worker and one.role is worker.role and one.flips_to is None
        for one in fleet.staying
    )
