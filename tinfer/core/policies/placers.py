"""Where a request starts when its route is given: on two workers, or on one."""

from __future__ import annotations

from collections.abc import Sequence

from tinfer.core.fleet import Fleet
from tinfer.core.policies.interfaces import Placement, WorkerChoice
from tinfer.core.requests import Request
from tinfer.core.types import Route
from tinfer.core.worker import Worker


class SplitPlacer:
    """Prefill on one of the workers that can hand off; whole where no two live workers can."""

    num_tried = 1

    def __init__(self, choice: WorkerChoice, otherwise: WholePlacer) -> None:
        self._choice = choice
        self._otherwise = otherwise

    def place(
        self, request: Request, fleet: Fleet, ahead_tokens: int, now_s: float
    ) -> Placement | None:
        if not fleet.split_sources:
            return self._otherwise.place(request, fleet, ahead_tokens, now_s)
        candidates = _open(fleet.split_sources, request)
        worker = self._choice.choose(request, candidates, now_s) if candidates else None
        return None if worker is None else Placement(Route.SPLIT, worker)


class WholePlacer:
    """All of it on one of the workers that no waiting hand-off could go to."""

    num_tried = 1

    def __init__(self, choice: WorkerChoice) -> None:
        self._choice = choice

    def place(
        self, request: Request, fleet: Fleet, ahead_tokens: int, now_s: float
    ) -> Placement | None:
        candidates = _open(fleet.open_to_whole(), request)
        worker = self._choice.choose(request, candidates, now_s) if candidates else None
        return None if worker is None else Placement(Route.WHOLE, worker)


def _open(workers: Sequence[Worker], request: Request) -> list[Worker]:
    return [one for one in workers if one.takes_prefill and one.is_open_to(request)]
