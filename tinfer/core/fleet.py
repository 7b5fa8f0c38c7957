"""The workers as the scheduler knows them: incarnations, what is placed on each, who may hand off.

Nothing here depends on the order in which workers came up: every list is sorted by `worker_id`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tinfer.core.events import WorkerUp
from tinfer.core.lifecycle import LifecycleError
from tinfer.core.requests import Request
from tinfer.core.types import Capacity, Role, WorkerSnapshot

# One chunk computes while the next stands ready: the engine never starves, and all else stays in
# the master's queue, where order and cancel are exact.
NUM_OUTSTANDING_CHUNKS = 2


@dataclass(slots=True, eq=False)
class Worker:
    """One live incarnation. Only the scheduler writes it; policies read it.

    `requests` are those that compute here, zombies included: each takes a seat.
    `outstanding_prefill_tokens` are prompt tokens sent and not yet known to be computed, those of
    `num_prefilling` requests; `num_placed_blocks` is what the prompts of `requests` need, with one
    token more each, and `num_held_blocks` what open leases keep.
    """

    id: str
    generation: int
    role: Role
    capacity: Capacity
    requests: dict[str, Request] = field(default_factory=dict)
    outstanding_prefill_tokens: int = 0
    num_prefilling: int = 0
    num_placed_blocks: int = 0
    num_held_blocks: int = 0

    @property
    def num_seqs(self) -> int:
        return len(self.requests)

    @property
    def num_projected_blocks(self) -> int:
        return self.num_placed_blocks + self.num_held_blocks

    @property
    def has_seat(self) -> bool:
        return self.num_seqs < self.capacity.max_num_seqs

    @property
    def takes_prefill(self) -> bool:
        """Whether a prefill sent now starts soon, rather than wait out of the master's sight."""
        limit_tokens = NUM_OUTSTANDING_CHUNKS * self.capacity.chunk_tokens
        return self.has_seat and self.outstanding_prefill_tokens < limit_tokens

    def blocks_for(self, request: Request) -> int:
        """KV blocks for the prompt and one more token."""
        return -(-(request.prompt_tokens + 1) // self.capacity.block_tokens)

    def place(self, request: Request, prefill_tokens: int) -> None:
        """Count a request here, with the prompt tokens that it has to compute here."""
        request.at = self
        request.prefill_tokens = prefill_tokens
        request.num_blocks = self.blocks_for(request)
        self.requests[request.id] = request
        self.outstanding_prefill_tokens += prefill_tokens
        self.num_prefilling += prefill_tokens > 0
        self.num_placed_blocks += request.num_blocks

    def prefill_done(self, request: Request) -> None:
        """The prompt is computed, the request stays."""
        self.outstanding_prefill_tokens -= request.prefill_tokens
        self.num_prefilling -= request.prefill_tokens > 0
        request.prefill_tokens = 0

    def remove(self, request: Request) -> None:
        """The request no longer computes here."""
        self.prefill_done(request)
        self.num_placed_blocks -= request.num_blocks
        del self.requests[request.id]
        request.at = None
        request.num_blocks = 0

    def snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            worker_id=self.id,
            generation=self.generation,
            role=self.role,
            outstanding_prefill_tokens=self.outstanding_prefill_tokens,
            num_seqs=self.num_seqs,
            num_projected_blocks=self.num_projected_blocks,
            num_held_blocks=self.num_held_blocks,
        )


def can_hand_off(source: Role, reader: Role) -> bool:
    """Whether a worker of role `source` may prefill for one of role `reader`.

    Not between two BOTH workers, which are replicas of each other: each could fill up with leases
    that wait for room on the other. Without that edge no chain of hand-offs closes into a circle.
    """
    both = source is Role.BOTH and reader is Role.BOTH
    return source.prefills and reader.decodes and not both


class Fleet:
    """Live incarnations, and the workers of which one is still to come."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.split_sources: list[Worker] = []
        self._by_id: dict[str, Worker] = {}
        self._last_generation: dict[str, int] = {}
        self._expected: dict[str, Role] = {}

    def get(self, worker_id: str, generation: int) -> Worker | None:
        """That incarnation if it is live; older ones and unknown ones are None."""
        worker = self._by_id.get(worker_id)
        return worker if worker is not None and worker.generation == generation else None

    def expect(self, worker_id: str, role: Role) -> None:
        """An incarnation of this worker is to come."""
        self._expected[worker_id] = role

    def give_up(self, worker_id: str) -> None:
        """No further incarnation of this worker will come."""
        self._expected.pop(worker_id, None)

    def up(self, event: WorkerUp) -> None:
        """Add an incarnation, unless it is an old one. Raises `LifecycleError` if another is up."""
        if event.generation <= self._last_generation.get(event.worker_id, -1):
            return
        if event.worker_id in self._by_id:
            raise LifecycleError(f"{event.worker_id}: up again before it was seen down")
        self._last_generation[event.worker_id] = event.generation
        worker = Worker(event.worker_id, event.generation, event.role, event.capacity)
        self._by_id[worker.id] = worker
        self.expect(worker.id, worker.role)
        self._index()

    def down(self, worker_id: str, generation: int) -> Worker | None:
        """Remove an incarnation and return it; None if it was not up."""
        last = self._last_generation.get(worker_id, -1)
        self._last_generation[worker_id] = max(last, generation)
        worker = self.get(worker_id, generation)
        if worker is not None:
            del self._by_id[worker_id]
            self._index()
        return worker

    def readers(self, source: Role) -> list[Worker]:
        """Live workers that may read what a worker of role `source` has prefilled."""
        return [worker for worker in self.workers if can_hand_off(source, worker.role)]

    def expects_reader(self, source: Role) -> bool:
        """Whether such a worker is up or to come."""
        if any(can_hand_off(source, role) for role in self._expected.values()):
            return True
        return bool(self.readers(source))

    @property
    def is_exhausted(self) -> bool:
        """Whether no worker is up and none will come."""
        return not self.workers and not self._expected

    def _index(self) -> None:
        self.workers = sorted(self._by_id.values(), key=lambda worker: worker.id)
        self.split_sources = [worker for worker in self.workers if self.readers(worker.role)]
