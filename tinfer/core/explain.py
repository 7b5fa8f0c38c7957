"""Why each waiting request waits, in words a person can act on. Pure; asked only by people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tinfer.core.fleet import Fleet
from tinfer.core.requests import Request
from tinfer.core.types import WaitingSnapshot
from tinfer.core.worker import Worker


def queued(
    requests: Iterable[Request], fleet: Fleet, now_s: float, limit: int
) -> list[WaitingSnapshot]:
    """The first `limit` requests of a queue, in the order in which they will start."""
    found = []
    for place, request in enumerate(requests):
        if place == limit:
            break
        reason = f"{place} ahead of it" if place else why_not_started(fleet)
        found.append(snapshot(request, reason, now_s))
    return found


def handed_off(
    requests: Iterable[Request], readers: Sequence[Worker], now_s: float, limit: int
) -> list[WaitingSnapshot]:
    """The first `limit` requests that are prefilled and wait for a decode worker."""
    found = []
    for place, request in enumerate(requests):
        if place == limit:
            break
        reasons = [why_not_admitted(request, worker) for worker in readers]
        found.append(snapshot(request, "; ".join(reasons) or "no decode worker is up", now_s))
    return found


def preempted(fleet: Fleet, now_s: float) -> list[WaitingSnapshot]:
    """Requests whose lost blocks another worker computes."""
    return [
        snapshot(
            again.serves, f"lost its KV on {again.serves.at.id}; {one.id} computes it again", now_s
        )
        for one in fleet.workers
        for again in one.prefilling.values()
        if again.serves is not None and again.serves.at is not None
    ]


def why_not_started(fleet: Fleet) -> str:
    """For the first in line."""
    if not fleet.workers:
        return "no worker is up"
    busy = []
    for worker in fleet.workers:
        if worker.is_draining:
            busy.append(f"{worker.id} drains to be stopped")
        elif not worker.has_seat:
            busy.append(f"{worker.id} has no seat left")
        elif not worker.takes_prefill:
            busy.append(f"{worker.id} has {worker.outstanding_prefill_tokens} prompt tokens to do")
        elif worker.flips_to is not None:
            busy.append(f"{worker.id} drains to become a {worker.flips_to.value} worker")
    return "; ".join(busy) or "another worker is worth waiting for"


def why_not_admitted(request: Request, worker: Worker) -> str:
    """What keeps a decode worker from taking it over now."""
    if not worker.has_seat:
        return f"{worker.id} has no seat left"
    needed_tokens = request.prompt_tokens + 1
    if needed_tokens > worker.free_tokens:
        return f"{worker.id} has room for {worker.free_tokens} of {needed_tokens} tokens"
    share = worker.fresh_peak_with(request).expected / max(1, worker.capacity_tokens)
    return f"{worker.id} would fill {share:.0%} of its KV cache"


def snapshot(request: Request, reason: str, now_s: float) -> WaitingSnapshot:
    return WaitingSnapshot(
        request_id=request.id,
        phase=request.phase.value,
        waited_s=now_s - request.arrived_s,
        prompt_tokens=request.prompt_tokens,
        expected_output_tokens=request.expected_tokens,
        reason=reason,
    )
