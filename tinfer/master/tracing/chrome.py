"""Slices, steps and happenings as events of the Chrome trace format, which Perfetto reads too.

Source of the format: "Trace Event Format", the document of the Chromium project's catapult. `ts`
and `dur` are whole microseconds, `ts` since 1970. A process (`pid`) is the master or a worker; its
first thread (`tid` 0) has what is of the whole process, each further one a lane of requests of
which no two overlap.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Any

from tinfer.master.tracing import steps
from tinfer.master.tracing.recorder import Lately
from tinfer.master.tracing.slices import MASTER, Slice, slices_of

Event = dict[str, Any]
# Events that are made at once: about a millisecond, in which no stream moves.
_MAX_BATCH = 200
_ROLES = ("prefill", "both", "whole", "decode")
_WHOLE_PROCESS = 0


def trace_events(lately: Lately, epoch_us: int) -> Iterator[list[Event]]:
    """All events of what was recorded, in batches that are made as they are taken; some are empty.

    `epoch_us` are the microseconds to add to the dispatcher's clock for those since 1970.
    """
    return _Drawing(lately, epoch_us).batches()


class _Drawing:
    """One picture: numbers of processes and lanes, and the events."""

    def __init__(self, lately: Lately, epoch_us: int) -> None:
        self._lately = lately
        self._epoch_us = epoch_us
        roles = lately.roles
        ranks = {worker_id: _ROLES.index(role) for worker_id, role in roles.items()}
        workers = sorted(roles, key=lambda worker_id: (ranks[worker_id], worker_id))
        self._pids = {place: pid for pid, place in enumerate([MASTER, *workers], 1)}
        self._lanes: defaultdict[str, Lanes] = defaultdict(Lanes)
        self._flow_ids = itertools.count(1)

    def batches(self) -> Iterator[list[Event]]:
        """See `trace_events`."""
        yield list(self._processes())
        yield from _batched(self._happenings())
        for worker_id, rows in self._lately.steps.items():
            if worker_id in self._pids:
                yield from _batched(self._steps(worker_id, rows))
        yield from self._requests()

    # --- processes ----------------------------------------------------------------------------

    def _processes(self) -> Iterator[Event]:
        for place, pid in self._pids.items():
            role = self._lately.roles.get(place)
            name = "master" if role is None else f"{place} ({role})"
            yield _about(pid, "process_name", name=name)
            yield _about(pid, "process_sort_index", sort_index=pid)
            yield _about(pid, "thread_name", name="events" if place == MASTER else "steps")

    def _happenings(self) -> Iterator[Event]:
        for one in self._lately.happenings:
            if one.worker_id in self._pids:
                event = self._event(
                    "i", one.name, "happening", one.worker_id, _WHOLE_PROCESS, one.at_s
                )
                yield {**event, "s": "p", "args": one.args}

    def _event(
        self, kind: str, name: str, category: str, place: str, tid: int, at_s: float
    ) -> Event:
        return {
            "ph": kind,
            "name": name,
            "cat": category,
            "pid": self._pids[place],
            "tid": tid,
            "ts": self._us(at_s),
        }

    def _us(self, at_s: float) -> int:
        return round(at_s * 1e6) + self._epoch_us

    # --- steps --------------------------------------------------------------------------------

    def _steps(self, worker_id: str, rows: bytes) -> Iterator[Event]:
        """Steps as slices, and what the engine held after them as counters, where it changed."""
        before_s = 0.0
        counts: tuple[float, float] | None = None
        used: float | None = None
        for row in steps.read(rows):
            start_s, before_s = max(before_s, row.end_s - row.busy_s), row.end_s
            if row.num_steps > 0:
                yield self._step(worker_id, row, start_s)
            if counts != (row.num_running, row.num_waiting):
                counts = row.num_running, row.num_waiting
                shown = {"running": round(row.num_running), "waiting": round(row.num_waiting)}
                yield self._counter("requests", worker_id, row.end_s, shown)
            if used != row.num_used_blocks:
                used = row.num_used_blocks
                shown = {"used": round(used)}
                yield self._counter("KV blocks", worker_id, row.end_s, shown)

    def _step(self, worker_id: str, row: steps.Steps, start_s: float) -> Event:
        name = "prefill step" if row.prompt_tokens > 0 else "decode step"
        event = self._event("X", name, "step", worker_id, _WHOLE_PROCESS, min(start_s, row.end_s))
        event["dur"] = self._us(row.end_s) - event["ts"]
        event["args"] = {
            "steps": round(row.num_steps),
            "prompt_tokens": round(row.prompt_tokens),
            "emitting": round(row.num_emitting),
        }
        return event

    def _counter(self, name: str, worker_id: str, at_s: float, counts: dict[str, int]) -> Event:
        event = self._event("C", name, "counter", worker_id, _WHOLE_PROCESS, at_s)
        return {**event, "args": counts}

    # --- requests -----------------------------------------------------------------------------

    def _requests(self) -> Iterator[list[Event]]:
        """Slices in the order in which they begin, so that few of them are there at a time."""
        numbers = itertools.count()
        waiting: list[tuple[float, int, Slice]] = []
        for record in sorted(self._lately.requests, key=lambda one: one.arrived_s):
            yield from _batched(self._begun(waiting, record.arrived_s))
            for one in slices_of(record, self._lately.now_s):
                if one.place in self._pids:
                    heappush(waiting, (one.start_s, next(numbers), one))
        yield from _batched(self._begun(waiting, math.inf))

    def _begun(self, waiting: list[tuple[float, int, Slice]], before_s: float) -> Iterator[Event]:
        """Give a lane to each that begins before that, and draw it."""
        while waiting and waiting[0][0] < before_s:
            _, _, one = heappop(waiting)
            lanes = self._lanes[one.place]
            num_lanes = lanes.num
            one.lane = lanes.take(one.start_s, one.end_s)
            if lanes.num > num_lanes:
                name = f"{'queue' if one.place == MASTER else 'requests'} {lanes.num}"
                yield _about(self._pids[one.place], "thread_name", tid=lanes.num, name=name)
            yield from self._slice(one)

    def _slice(self, one: Slice) -> Iterator[Event]:
        yield self._complete(one, one)
        for inner in one.inner:
            yield self._complete(inner, one)
        for name, at_s in one.instants:
            event = self._event("i", name, "request", one.place, one.lane, at_s)
            yield {**event, "s": "t", "args": {"request": one.args["request"]}}
        before = one.follows
        if before is None or not before.lane:
            return
        flow_id = next(self._flow_ids)
        # Within the slice before: the viewers attach an arrow to what is there at that moment.
        left_s = max(before.start_s, min(before.end_s - 1e-6, one.start_s))
        left = self._event("s", "next", "flow", before.place, before.lane, left_s)
        yield {**left, "id": flow_id}
        reached = self._event("f", "next", "flow", one.place, one.lane, one.start_s)
        yield {**reached, "id": flow_id, "bp": "e"}

    def _complete(self, one: Slice, outer: Slice) -> Event:
        event = self._event("X", one.name, "request", outer.place, outer.lane, one.start_s)
        return {**event, "dur": self._us(one.end_s) - event["ts"], "args": one.args}


class Lanes:
    """Rows for what may overlap; `num` of them were needed."""

    def __init__(self) -> None:
        self.num = 0
        self._busy: list[tuple[float, int]] = []
        self._free: list[int] = []

    def take(self, start_s: float, end_s: float) -> int:
        """The first row that is free from then on, by number from 1. Starts never go back."""
        while self._busy and self._busy[0][0] <= start_s:
            heappush(self._free, heappop(self._busy)[1])
        if self._free:
            lane = heappop(self._free)
        else:
            self.num += 1
            lane = self.num
        heappush(self._busy, (end_s, lane))
        return lane


def _about(pid: int, what: str, tid: int = _WHOLE_PROCESS, **args: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _batched(found: Iterator[Event]) -> Iterator[list[Event]]:
    while batch := list(itertools.islice(found, _MAX_BATCH)):
        yield batch
