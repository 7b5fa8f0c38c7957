"""All that a comparison measures, as data: `session` fills it, `journal` keeps it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from tinfer.bench.compare.capacity import Verdict
from tinfer.bench.compare.limits import Unloaded
from tinfer.bench.compare.samples import Sample
from tinfer.bench.compare.steps import Step
from tinfer.bench.target import Target


class Probe(Struct, frozen=True, kw_only=True):
    """One look for the full load of a workload."""

    arm: str
    rate_rps: float
    verdict: Verdict


class FullLoad(Struct, frozen=True, kw_only=True):
    """What 100 % is; `arm` is the replica arm that keeps up with it, None where it was given."""

    rate_rps: float
    arm: str | None
    probes: list[Probe]


class Run(Struct, frozen=True, kw_only=True):
    """One measured step. `idle_cpu_share`: what all other arms together used of one core."""

    step: Step
    rate_rps: float
    sample: Sample
    figures: dict[str, Any]
    records: list[Any] | None
    idle_cpu_share: float


class Recorded(Struct, kw_only=True):
    """All that has been measured so far; complete unless `ended_early` says why not.

    `resumed` are the dates at which the earlier parts of it began, where it was interrupted.
    `schedulers`: by tinfer arm that was started, what it decides by, its costs of a step included.
    """

    unloaded: dict[str, Unloaded] = {}
    full_load: dict[str, FullLoad] = {}
    runs: list[Run] = []
    target: Target | None = None
    vocab_size: int | None = None
    ended_early: str | None = None
    resumed: list[str] = []
    schedulers: dict[str, dict[str, Any]] = {}
