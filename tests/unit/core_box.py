"""A scheduler with a few workers that say what a test makes them say."""

from __future__ import annotations

from typing import Any

from tinfer.core.events import (
    Action,
    Arrived,
    Event,
    Prefilled,
    Pulled,
    StartDecode,
    WorkerUp,
)
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import (
    Capacity,
    LeaseKey,
    Phase,
    Role,
    SchedulerConfig,
    WorkerSnapshot,
)

CAPACITY = Capacity(num_blocks=100, block_tokens=16, max_num_seqs=4, chunk_tokens=50)
KEY = LeaseKey("p", 0, 0, 0)
# The plainest policy of each kind: what they decide is tested with the policies.
PLAIN: dict[str, Any] = {
    "route": "split",
    "prefill_order": "fcfs",
    "prefill_choice": "least-loaded",
    "whole_choice": "least-loaded",
    "decode_choice": "least-kv",
    "decode_admission": "greedy",
    "prefill_budget": "whole-chunks",
    "preemption": "here",
}
HAND_OFF = StartDecode("r", "d", 0, KEY)


class Box:
    """A scheduler and shorthand for what its workers may say."""

    def __init__(self, roles: str = "p d", capacity: Capacity = CAPACITY, **config: object) -> None:
        self.scheduler = Scheduler(SchedulerConfig(**PLAIN | config))
        self.capacity = capacity
        for worker_id in roles.split():
            self.up(worker_id)

    def on(self, *events: Event) -> list[Action]:
        return [action for event in events for action in self.scheduler.on_event(event, 0.0)]

    def up(self, worker_id: str, generation: int = 0) -> list[Action]:
        roles = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}
        return self.on(WorkerUp(worker_id, generation, roles[worker_id[0]], self.capacity))

    def arrive(self, request_id: str = "r", prompt: int = 20, out: int = 8) -> list[Action]:
        return self.on(Arrived(request_id, prompt, out))

    def prefilled(self, request_id: str = "r", slot: int = 0, worker_id: str = "p") -> list[Action]:
        return self.on(Prefilled(request_id, worker_id, 0, LeaseKey(worker_id, 0, slot, 0), 2))

    def to_handoff(self) -> None:
        self.arrive()
        assert self.prefilled() == [HAND_OFF]

    def to_decoding(self) -> None:
        self.to_handoff()
        assert self.on(Pulled("r", "d", 0, True)) == []

    def to_waiting(self) -> None:
        """`r` is prefilled and waits, since one request fills all of `d`'s seats."""
        for slot in range(self.capacity.max_num_seqs):
            self.arrive(f"f{slot}")
            assert self.prefilled(f"f{slot}", slot + 1) != []
        self.arrive()
        assert self.prefilled() == []

    def phase(self, request_id: str = "r") -> Phase | None:
        return self.scheduler.request_phase(request_id)

    def worker(self, worker_id: str) -> WorkerSnapshot:
        (seen,) = [w for w in self.scheduler.workers_snapshot() if w.worker_id == worker_id]
        return seen

    def assert_zero(self) -> None:
        assert self.scheduler.ledger_snapshot().is_zero
        for seen in self.scheduler.workers_snapshot():
            counts = (seen.outstanding_prefill_tokens, seen.num_seqs, seen.num_projected_blocks)
            assert counts == (0, 0, 0)
