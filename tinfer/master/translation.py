"""Leases and steps as the wire has them, and as the scheduler has them; its failures as errors."""

from __future__ import annotations

from tinfer.core import events
from tinfer.core.types import LeaseKey
from tinfer.errors import NoWorker, Overloaded, TinferError, WorkerLost
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation

# A client that is sent away for longer than this asks too late.
MAX_RETRY_AFTER_S = 60.0


def stepped(sender: Incarnation, step: wire.Step) -> events.Stepped:
    stats = step.stats
    return events.Stepped(
        *sender,
        num_steps=stats.num_steps,
        busy_s=stats.busy_s,
        num_prefill_tokens=stats.num_computed_prompt_tokens,
        num_free_blocks=stats.num_free_blocks,
        progress=tuple(step.progress),
        preempted=tuple(step.preempted),
    )


def key_of(owner: Incarnation, lease: wire.LeaseId) -> LeaseKey:
    return LeaseKey(owner.worker_id, owner.generation, lease.slot, lease.generation)


def source_key(source: wire.Source) -> LeaseKey:
    return key_of(Incarnation(source.worker_id, source.worker_generation), source.lease)


def owner_of(key: LeaseKey) -> Incarnation:
    return Incarnation(key.worker_id, key.worker_generation)


def lease_of(key: LeaseKey) -> wire.LeaseId:
    return wire.LeaseId(key.slot, key.lease_generation)


def error_of(fail: events.Fail) -> TinferError:
    """What the client is told of a failure that the scheduler has seen."""
    if fail.cause in ("queue-full", "slo"):
        return Overloaded(fail.message, min(MAX_RETRY_AFTER_S, fail.retry_after_s))
    if fail.cause == "no-worker":
        return NoWorker(fail.message)
    return WorkerLost(fail.message)
