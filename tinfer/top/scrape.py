"""One look at a server: what `/metrics`, `/debug/state` and `/debug/ledger` said at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from tinfer.errors import StartError
from tinfer.top.view import Waiting

# The labels of one series, with their values.
Labels = frozenset[tuple[str, str]]


class Metrics:
    """The series of one answer of `/metrics`, by the name of their samples."""

    def __init__(self, text: str = "") -> None:
        """Raises `ValueError` for what is not in Prometheus' format."""
        self._series: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                of_name = self._series.setdefault(sample.name, {})
                of_name[frozenset(sample.labels.items())] = sample.value

    def series(self, name: str, **labels: str) -> Mapping[Labels, float]:
        """All series of that name that have these labels."""
        wanted = labels.items()
        return {key: value for key, value in self._series.get(name, {}).items() if wanted <= key}

    def total(self, name: str, **labels: str) -> float | None:
        """Their sum; None where there is none."""
        found = self.series(name, **labels)
        return sum(found.values()) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of a name's series by the value of one label, in the order of the answer."""
        found: dict[str, float] = {}
        for key, value in self._series.get(name, {}).items():
            of_label = dict(key).get(label, "")
            found[of_label] = found.get(of_label, 0.0) + value
        return found

    def label(self, name: str, label: str) -> str:
        """The value of a label of the first series of that name; empty where there is none."""
        return next((dict(key).get(label, "") for key in self._series.get(name, {})), "")


class WorkerState(Struct, frozen=True, kw_only=True):
    """What is read of a worker in `/debug/state`."""

    id: str
    role: str
    state: str
    device: str
    generation: int
    reason: str = ""


class State(Struct, frozen=True, kw_only=True):
    """What is read of `/debug/state` (docs/behaviour.md)."""

    workers: list[WorkerState]
    status: str = ""
    requests_by_phase: dict[str, int] = {}
    waiting: list[Waiting] = []


class Accounts(Struct, frozen=True, kw_only=True):
    """What is read of `/debug/ledger`."""

    pulls: int = 0
    zombies: int = 0


class Scrape(Struct, frozen=True, kw_only=True):
    """What the server said. `at_s` is a moment of this machine's monotonic clock, `unix_s` the same
    moment as Unix time."""

    at_s: float
    unix_s: float
    metrics: Metrics
    state: State
    accounts: Accounts


def scrape_of(
    metrics: str, state: dict[str, Any], ledger: dict[str, Any], at_s: float, unix_s: float
) -> Scrape:
    """The three answers together. Raises `StartError` where they are not of a server like this."""
    try:
        return Scrape(
            at_s=at_s,
            unix_s=unix_s,
            metrics=Metrics(metrics),
            state=msgspec.convert(state, State),
            accounts=msgspec.convert(ledger, Accounts),
        )
    except (ValueError, msgspec.ValidationError) as error:
        raise StartError(f"this is no tinfer server, or one of another version: {error}") from error
