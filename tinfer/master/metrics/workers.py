"""What a scrape reads of each worker: from the supervisor whether it lives, from the scheduler what
it is believed to do, from its own last message what its engine holds and has done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Role, WorkerSnapshot
from tinfer.master.loop import Dispatcher
from tinfer.master.metrics.histogram import Counts
from tinfer.master.supervisor import Cause, Life, Supervisor, WorkerSlot
from tinfer.wire.messages import WorkerStats

# Of one metric: a value for each combination of its own labels.
Values = Mapping[tuple[str, ...], float | Counts]
_Mutable = dict[tuple[str, ...], float | Counts]

# Metric, and what of TOTALS it shows.
_TOTALS = {
    "worker_steps": "num_steps",
    "worker_busy_seconds": "busy_s",
    "worker_prompt_tokens": "num_computed_prompt_tokens",
    "worker_recomputed_tokens": "num_recomputed_pulled_tokens",
    "worker_preemptions": "num_preemptions",
    "worker_pulled_bytes": "pulled_bytes",
    "worker_pull_seconds": "pull_s",
}
_OF_A_WORKER = (
    *("worker_info", "worker_up", "worker_generation", "worker_deaths", "worker_restarts"),
    *("role_changes", "worker_requests", "worker_outstanding_prefill_tokens"),
    *("worker_prefill_share", "worker_slowness", "worker_kv_bytes", "worker_kv_used_bytes"),
    *("worker_kv_held_bytes", "worker_mapped_peers", "worker_stale_mappings", "worker_pulls"),
    *_TOTALS,
)
_NOTHING = WorkerStats()


class WorkerReader:
    """Reads the state of all workers, those that are down among them."""

    def __init__(
        self, dispatcher: Dispatcher, scheduler: Scheduler, supervisor: Supervisor
    ) -> None:
        self._dispatcher = dispatcher
        self._scheduler = scheduler
        self._supervisor = supervisor

    def values(self) -> dict[str, Values]:
        """By the metric's name and its own labels, of which the first is the worker's id."""
        slots = self._supervisor.slots
        found: dict[str, _Mutable] = {name: {} for name in _OF_A_WORKER}
        views = {view.worker_id: view for view in self._scheduler.workers_snapshot()}
        for worker_id, slot in slots.items():
            stats = self._stats_of(slot)
            self._life(found, worker_id, slot)
            self._engine(found, worker_id, slot, stats)
            _view(found, worker_id, slot, views.get(worker_id))
            for metric, name in _TOTALS.items():
                total = self._dispatcher.tally.worker_total(worker_id, name, stats)
                found[metric][worker_id,] = total
        return {
            "workers": {(): len(slots)},
            "workers_up": {(): sum(not slot.is_leaving for slot in self._serving())},
            **found,
        }

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks of all workers that serve, 0 to 1."""
        ready = [slot.ready for slot in self._serving() if slot.ready is not None]
        num_blocks = sum(one.num_blocks for one in ready)
        num_used = sum(stats.num_used_blocks for stats in self._dispatcher.stats.values())
        return num_used / num_blocks if num_blocks else 0.0

    def sum_of(self, name: str) -> float:
        """One of TOTALS over all workers."""
        return sum(
            self._dispatcher.tally.worker_total(worker_id, name, self._stats_of(slot))
            for worker_id, slot in self._supervisor.slots.items()
        )

    def _serving(self) -> list[WorkerSlot]:
        return [slot for slot in self._supervisor.slots.values() if slot.life is Life.READY]

    def _stats_of(self, slot: WorkerSlot) -> WorkerStats:
        """What its incarnation said last; zeros where that is nothing."""
        return self._dispatcher.stats.get(slot.incarnation, _NOTHING)

    def _life(self, found: dict[str, _Mutable], worker_id: str, slot: WorkerSlot) -> None:
        role = self._dispatcher.changed_roles.get(worker_id, slot.placement.role)
        state = "draining" if slot.is_leaving else slot.life.value
        found["worker_info"][worker_id, role.value, state, slot.placement.label] = 1
        found["worker_up"][worker_id,] = slot.life is Life.READY
        found["worker_generation"][worker_id,] = slot.generation
        found["worker_restarts"][worker_id,] = slot.num_restarts
        for cause in get_args(Cause):
            found["worker_deaths"][worker_id, cause] = self._supervisor.deaths[worker_id, cause]
        for one in (Role.PREFILL, Role.DECODE):
            num_changes = self._dispatcher.tally.role_changes[worker_id, one.value]
            found["role_changes"][worker_id, one.value] = num_changes

    def _engine(
        self, found: dict[str, _Mutable], worker_id: str, slot: WorkerSlot, stats: WorkerStats
    ) -> None:
        ready = slot.ready if slot.life is Life.READY else None
        block_bytes = 0.0 if ready is None else ready.kv_bytes / ready.num_blocks
        found["worker_requests"][worker_id, "running"] = stats.num_running
        found["worker_requests"][worker_id, "waiting"] = stats.num_waiting
        found["worker_kv_bytes"][worker_id,] = 0 if ready is None else ready.kv_bytes
        found["worker_kv_used_bytes"][worker_id,] = stats.num_used_blocks * block_bytes
        found["worker_mapped_peers"][worker_id,] = stats.num_mapped_peers
        found["worker_stale_mappings"][worker_id,] = stats.num_stale_mappings
        num_pulls = self._dispatcher.tally.worker_total(worker_id, "num_pulls", stats)
        num_failed = self._dispatcher.tally.worker_total(worker_id, "num_failed_pulls", stats)
        found["worker_pulls"][worker_id, "copied"] = num_pulls - num_failed
        found["worker_pulls"][worker_id, "failed"] = num_failed


def _view(
    found: dict[str, _Mutable], worker_id: str, slot: WorkerSlot, view: WorkerSnapshot | None
) -> None:
    """What only a worker that serves has: no value stands for one that does not."""
    held_bytes = 0.0
    if view is not None and slot.ready is not None:
        held_bytes = view.num_held_blocks * slot.ready.kv_bytes / slot.ready.num_blocks
        tokens = view.outstanding_prefill_tokens
        found["worker_outstanding_prefill_tokens"][worker_id,] = tokens
        found["worker_prefill_share"][worker_id,] = view.prefill_share
        found["worker_slowness"][worker_id,] = view.slowness
    found["worker_kv_held_bytes"][worker_id,] = held_bytes
