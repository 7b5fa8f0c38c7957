"""The workers as the scheduler knows them: incarnations, what is placed on each, who may hand off.

Nothing here depends on the order in which workers came up: every list is sorted by `worker_id`.
"""

from __future__ import annotations

from tinfer.core.costs import CostModel
from tinfer.core.events import WorkerUp
from tinfer.core.lifecycle import LifecycleError
from tinfer.core.types import Role
from tinfer.core.worker import Worker

# Of what sets an idle worker's speed apart, with every `Tick`: half of it is forgotten in 3 s.
FORGOTTEN_PER_TICK = 0.02


def can_hand_off(source: Role, reader: Role) -> bool:
    """Whether a worker of role `source` may prefill for one of role `reader`.

    Not between two BOTH workers, which are replicas of each other: each could fill up with leases
    that wait for room on the other. Without that edge no chain of hand-offs closes into a circle.
    """
    both = source is Role.BOTH and reader is Role.BOTH
    return source.prefills and reader.decodes and not both


class Fleet:
    """Live incarnations, and the workers of which one is still to come."""

    def __init__(
        self, costs: CostModel, overflow_z: float = 0.0, ageing_tokens_per_s: float = 0.0
    ) -> None:
        self._costs = costs
        self._overflow_z = overflow_z
        self._ageing_tokens_per_s = ageing_tokens_per_s
        # Roles of the workers whose hand-offs wait for a reader with room.
        self.waiting_sources: set[Role] = set()
        # Requests that wait for a first worker.
        self.num_queued = 0
        self.workers: list[Worker] = []
        # Those of them on which something may start.
        self.staying: list[Worker] = []
        self.split_sources: list[Worker] = []
        self._readers: dict[Role, list[Worker]] = {role: [] for role in Role}
        self._by_id: dict[str, Worker] = {}
        self._last_generation: dict[str, int] = {}
        self._slowness: dict[str, float] = {}
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
        worker = Worker(
            event.worker_id,
            event.generation,
            self._role_of(event),
            event.capacity,
            self._costs,
            self._overflow_z,
            self._ageing_tokens_per_s,
        )
        worker.learn_slowness(self._known_slowness(worker.id))
        self._by_id[worker.id] = worker
        self.expect(worker.id, worker.role)
        self._index()

    def _role_of(self, event: WorkerUp) -> Role:
        """A worker comes back in the role that it has taken: the others' roles count on it."""
        taken = self._expected.get(event.worker_id)
        if taken is not None and {taken, event.role} == {Role.PREFILL, Role.DECODE}:
            return taken
        return event.role

    def down(self, worker_id: str, generation: int) -> Worker | None:
        """Remove an incarnation and return it; None if it was not up."""
        last = self._last_generation.get(worker_id, -1)
        self._last_generation[worker_id] = max(last, generation)
        worker = self.get(worker_id, generation)
        if worker is not None:
            self._slowness[worker_id] = worker.slowness
            del self._by_id[worker_id]
            self._index()
        return worker

    def _known_slowness(self, worker_id: str) -> float:
        """How slow a new incarnation will be: as the last one was, or as the others are. One that
        is believed slower than they would get no work by which it could show that it is not."""
        if worker_id in self._slowness:
            return self._slowness[worker_id]
        others = [one.slowness for one in self.workers if one.num_steps]
        return sum(others) / len(others) if others else 1.0

    def share_speed(self) -> None:
        """Have workers that have not shown their speed yet take that of the others."""
        unknown = [one for one in self.workers if not one.num_steps]
        known = [one.slowness for one in self.workers if one.num_steps]
        if unknown and known:
            for one in unknown:
                one.learn_slowness(sum(known) / len(known))

    def forget_speed(self) -> None:
        """Have idle workers slowly taken for as fast as all are: one that was slow once gets no
        work by which it could show that it is not any more."""
        known = [one.slowness for one in self.workers if one.num_steps]
        if not known:
            return
        mean = sum(known) / len(known)
        for one in self.workers:
            if not one.requests:
                one.learn_slowness(one.slowness + FORGOTTEN_PER_TICK * (mean - one.slowness))

    def readers(self, source: Role) -> list[Worker]:
        """Live workers that may read what a worker of role `source` has prefilled."""
        return self._readers[source]

    def open_to_whole(self) -> list[Worker]:
        """All but those that a waiting hand-off could go to: it was first, and it holds memory."""
        if not self.waiting_sources:
            return self.staying
        return [
            worker
            for worker in self.staying
            if not any(can_hand_off(source, worker.role) for source in self.waiting_sources)
        ]

    @property
    def num_taking(self) -> int:
        """Workers with a seat for one more request."""
        return sum([one.has_seat for one in self.staying])

    def expects_reader(self, source: Role) -> bool:
        """Whether such a worker is up or to come; one that drains may still do so for long."""
        if self.readers(source):
            return True
        leaving = {one.id for one in self.workers if one.is_draining}
        return any(
            can_hand_off(source, role)
            for worker_id, role in self._expected.items()
            if worker_id not in leaving
        )

    def begin_drain(self, worker: Worker) -> None:
        """From now on nothing starts there."""
        worker.is_draining = True
        self._index()

    def begin_flip(self, worker: Worker, role: Role) -> None:
        """From now on nothing starts there that belongs to its role alone."""
        worker.flips_to = role
        self._index()

    def end_flips(self) -> list[Worker]:
        """Give those their new role that have drained, and return them.

        A decode worker's residents stay; a prefill worker has handed over all that it prefilled.
        """
        flipped = []
        for worker in self.workers:
            if worker.flips_to is None or (
                worker.flips_to is Role.DECODE and worker.is_handing_off
            ):
                continue
            worker.role, worker.flips_to = worker.flips_to, None
            if worker.id in self._expected:
                self._expected[worker.id] = worker.role
            flipped.append(worker)
        if flipped:
            self._index()
        return flipped

    @property
    def is_exhausted(self) -> bool:
        """Whether no worker is up and none will come."""
        return not self.workers and not self._expected

    def _index(self) -> None:
        self.workers = sorted(self._by_id.values(), key=lambda worker: worker.id)
        self.staying = [worker for worker in self.workers if not worker.is_draining]
        able = [worker for worker in self.staying if worker.flips_to is None]
        for source in Role:
            self._readers[source] = [one for one in able if can_hand_off(source, one.role)]
        self.split_sources = [worker for worker in able if self._readers[worker.role]]
