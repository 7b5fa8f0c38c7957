"""What has to hold of any trace, its slices by name, and a dispatcher that makes one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tests.unit.master_box import DispatcherBox
from tinfer.master.tracing.chrome import trace_events

Event = dict[str, Any]
COMMON = {"ph", "name", "cat", "pid", "tid", "ts"}
# What an event of each kind has beside those.
MORE = {
    "X": {"dur", "args"},
    "i": {"s", "args"},
    "C": {"args"},
    "s": {"id"},
    "f": {"id", "bp"},
}


def check_trace(events: Iterable[Event]) -> None:
    """Every event is whole, slices of one row nest, and arrows lead forward from slice to slice."""
    rows: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    left: dict[int, Event] = {}
    arrows: list[tuple[Event, Event]] = []
    named: set[int] = set()
    for event in events:
        kind = event["ph"]
        if kind == "M":
            named.add(event["pid"])
            assert event.keys() == {"ph", "name", "pid", "tid", "args"}
            continue
        assert event.keys() == COMMON | MORE[kind], event
        assert event["pid"] in named and isinstance(event["ts"], int)
        if kind == "X":
            assert event["dur"] >= 0, event
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif kind == "s":
            left[event["id"]] = event
        elif kind == "f":
            arrows.append((left.pop(event["id"]), event))
    assert not left
    for row in rows.values():
        _check_nested(row)
    for start, end in arrows:
        assert start["ts"] <= end["ts"] and start["pid"] != end["pid"]
        for side in (start, end):
            row = rows[side["pid"], side["tid"]]
            assert any(begun <= side["ts"] <= ended for begun, ended in row), side


def _check_nested(row: list[tuple[int, int]]) -> None:
    """Each lies within those that are open where it begins, or begins where they have ended."""
    open_ends: list[int] = []
    for start, end in sorted(row, key=lambda one: (one[0], -one[1])):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], row
        open_ends.append(end)


class Seen:
    """The events of one trace, checked."""

    def __init__(self, events: list[Event]) -> None:
        check_trace(events)
        self.events = events
        self.places: dict[int, str] = {
            one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"
        }

    def slices(self, name: str | None = None) -> list[Event]:
        """Slices of requests, of that name or all of them, in the order of their begin."""
        found = [
            one
            for one in self.events
            if one["ph"] == "X" and one["cat"] == "request" and name in (None, one["name"])
        ]
        return sorted(found, key=lambda one: one["ts"])

    def shown(self) -> list[tuple[str, str, float, float]]:
        """Name, process, begin and end of every slice of a request, in seconds of the first one's
        begin."""
        found = self.slices()
        zero_us = found[0]["ts"] if found else 0
        return [
            (
                one["name"],
                self.places[one["pid"]],
                (one["ts"] - zero_us) / 1e6,
                (one["ts"] + one["dur"] - zero_us) / 1e6,
            )
            for one in found
        ]

    def shown_at(self) -> list[tuple[str, int, int]]:
        """Name, begin and length of every slice of a request, in microseconds since 1970."""
        return [(one["name"], one["ts"], one["dur"]) for one in self.slices()]

    def instants(self) -> list[tuple[str, str]]:
        """Name and process of everything that took no time, in order."""
        found = sorted((one for one in self.events if one["ph"] == "i"), key=lambda one: one["ts"])
        return [(one["name"], self.places[one["pid"]]) for one in found]

    def seconds_of(self, name: str) -> float:
        """How long the slices of that name were, together."""
        return float(sum(one["dur"] for one in self.slices(name))) / 1e6


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.at_s = 100.0

    def now_s(self) -> float:
        return self.at_s


class Box(DispatcherBox):
    """A dispatcher whose time a test moves, and what it shows."""

    def __init__(self, roles: str = "p d", **config: Any) -> None:
        super().__init__(roles, **config)
        self.clock = Clock()
        self.dispatcher._clock = self.clock

    def after(self, seconds: float) -> None:
        self.clock.at_s += seconds

    def seen(self, request_id: str | None = "r", seconds: float = 3600.0) -> Seen:
        lately = self.dispatcher.lately(seconds, request_id)
        return Seen([one for batch in trace_events(lately, 1_000_000) for one in batch])
