"""Leases and steps as the wire has them, and as the scheduler has them."""

from __future__ import annotations

from tinfer.core import events
from tinfer.core.types import LeaseKey
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation


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
