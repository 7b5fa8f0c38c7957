"""In which order queued requests start.

The paper's modes sort `prefill_sched_batch` requests at a time, and nothing overtakes a batch: that
bounds how long a long prompt waits under `sjf` (arXiv 2401.11181, section 3.3.1). Ours is shortest
remaining prefill first, with ageing and deadlines. What clients ask for by `priority` goes before
all of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from tinfer.core.costs import CostModel
from tinfer.core.fleet import Fleet
from tinfer.core.policies.interfaces import PrefillOrder
from tinfer.core.requests import Request
from tinfer.core.types import SchedulerConfig

# More prompt tokens per second of waiting than any two prompts differ by.
FIRST_COME = 1e18


class Fcfs:
    """First come, first served."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, now_s: float) -> None:
        self._requests[request.id] = request

    def discard(self, request: Request) -> None:
        self._requests.pop(request.id, None)

    def in_order(self, now_s: float) -> Iterator[Request]:
        return iter(self._requests.values())

    listed = in_order


class Batched:
    """The first `batch` requests by length, and the next ones only when all of them have started.

    A batch is formed when the one before is gone, of what waits then. `sign` 1 puts the shortest
    first, -1 the longest; equal ones go by arrival.
    """

    def __init__(self, batch: int, sign: int) -> None:
        self._size = batch
        self._sign = sign
        self._raw: dict[str, Request] = {}
        self._batch: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._raw) + len(self._batch)

    def add(self, request: Request, now_s: float) -> None:
        self._raw[request.id] = request

    def discard(self, request: Request) -> None:
        self._raw.pop(request.id, None)
        self._batch.pop(request.id, None)

    def in_order(self, now_s: float) -> Iterator[Request]:
        if not self._batch:
            for one in self._sorted(islice(self._raw.values(), self._size)):
                self._batch[one.id] = one
                del self._raw[one.id]
        return iter(self._batch.values())

    def listed(self, now_s: float) -> Iterator[Request]:
        yield from self._batch.values()
        raw = list(self._raw.values())
        for start in range(0, len(raw), self._size):
            yield from self._sorted(raw[start : start + self._size])

    def _sorted(self, requests: Iterable[Request]) -> list[Request]:
        return sorted(requests, key=lambda one: (self._sign * one.prompt_tokens, one.arrival_seq))


class Srpt:
    """Shortest remaining prefill first, aged, and what would miss its TTFT deadline before that.

    Remaining is the time that the uncached part of the prompt takes. A second of waiting counts as
    `ageing` seconds less of it, so a request of `c` seconds is overtaken by nothing that arrives
    `c / ageing` seconds after it: its wait is bounded. With deadlines (`ttft_deadline_s` after
    arrival), a request goes first if it can still make its deadline and could not after the one
    that would go before it; of several, the one that has to start earliest.
    """

    def __init__(
        self, costs: CostModel, ageing: float, ttft_deadline_s: float | None, fleet: Fleet
    ) -> None:
        self._costs = costs
        self._ageing = ageing
        self._ttft_deadline_s = ttft_deadline_s
        self._fleet = fleet
        self._cost_s: dict[str, float] = {}
        self._by_rank: list[tuple[float, int, Request]] = []
        self._by_start: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._by_rank)

    def add(self, request: Request, now_s: float) -> None:
        workers = self._fleet.workers
        num_new = min((one.uncached_tokens(request) for one in workers), default=1)
        self._cost_s[request.id] = self._costs.prefill_token_s * num_new
        insort(self._by_rank, self._rank(request))
        if self._ttft_deadline_s is not None:
            insort(self._by_start, self._latest_start(request))

    def discard(self, request: Request) -> None:
        if request.id in self._cost_s:
            _remove(self._by_rank, self._rank(request))
            if self._ttft_deadline_s is not None:
                _remove(self._by_start, self._latest_start(request))
            del self._cost_s[request.id]

    def in_order(self, now_s: float) -> Iterator[Request]:
        urgent = list(self._urgent(now_s)) if self._by_start else []
        yield from urgent
        for _, _, request in self._by_rank:
            if request not in urgent:
                yield request

    listed = in_order

    def _rank(self, request: Request) -> tuple[float, int, Request]:
        rank = self._cost_s[request.id] + self._ageing * request.arrived_s
        return (rank, request.arrival_seq, request)

    def _latest_start(self, request: Request) -> tuple[float, int, Request]:
        assert self._ttft_deadline_s is not None
        deadline_s = request.arrived_s + self._ttft_deadline_s
        return (deadline_s - self._cost_s[request.id], request.arrival_seq, request)

    def _urgent(self, now_s: float) -> Iterator[Request]:
        """Those that can start in time now, and not after the first by rank."""
        _, _, first = self._by_rank[0]
        horizon_s = now_s + self._cost_s[first.id]
        begin = bisect_left(self._by_start, now_s, key=lambda one: one[0])
        for latest_s, _, request in islice(self._by_start, begin, None):
            if latest_s >= horizon_s:
                return
            yield request


class ByPriority:
    """A queue for every priority that waits, the lowest number first: nothing starts before all
    that is of a lower one, as in vLLM's priority scheduling. Each has an order from `make`."""

    def __init__(self, make: Callable[[], PrefillOrder]) -> None:
        self._make = make
        # In order of priority; none is empty.
        self._levels: dict[int, PrefillOrder] = {}

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def add(self, request: Request, now_s: float) -> None:
        if request.priority not in self._levels:
            self._levels[request.priority] = self._make()
            self._levels = dict(sorted(self._levels.items()))
        self._levels[request.priority].add(request, now_s)

    def discard(self, request: Request) -> None:
        level = self._levels.get(request.priority)
        if level is not None:
            level.discard(request)
            if not len(level):
                del self._levels[request.priority]

    def in_order(self, now_s: float) -> Iterator[Request]:
        for level in self._levels.values():
            yield from level.in_order(now_s)

    def listed(self, now_s: float) -> Iterator[Request]:
        for level in self._levels.values():
            yield from level.listed(now_s)


def _remove(ordered: list[tuple[float, int, Request]], entry: tuple[float, int, Request]) -> None:
    """Drop the entry of that key; the arrival number makes keys unique."""
    place = bisect_left(ordered, entry[:2], key=lambda one: one[:2])
    del ordered[place]


def ageing_tokens_per_s(config: SchedulerConfig) -> float:
    """Prompt tokens less that a second of waiting counts as; by order of arrival none overtakes."""
    if config.prefill_order != "srpt":
        return FIRST_COME
    return config.ageing / max(config.costs.prefill_token_s, 1e-9)
