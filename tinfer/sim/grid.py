"""A grid of loads on boxes: what a cell is, which arms run in it, and what its runs say.

All arms of a cell get the same requests, and all cells of one workload the same draws, only faster
or slower. 100 % load is found by whoever runs the grid; see benchmarks/sim_grid.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from tinfer.config import ServeConfig
from tinfer.core.costs import CostModel
from tinfer.sim.arms import Arm, SchedulerOf, baseline_arm, run_arm, tinfer_arm
from tinfer.sim.boxes import Box
from tinfer.sim.paired import Estimate, ratio_of
from tinfer.sim.results import Slo, figures_of
from tinfer.sim.sources import Source, requests_of
from tinfer.sim.spec import SimRequest
from tinfer.sim.workload import sim_requests
from tinfer.sim.world import SimulationError

AUTO, SPLIT, HYBRID = "auto", "split", "hybrid"
REPLICAS = ("replicas", "replicas-512")
ARMS = (AUTO, SPLIT, HYBRID, *REPLICAS)
WORKLOADS = ("LPLD", "LPHD", "HPLD", "HPHD", "Mixed", "azure-code", "azure-conversation", "burst")
LOADS = (0.3, 0.5, 0.7, 0.85, 0.95, 1.1)
NUMS_OF_WORKERS = (2, 4, 8)
# Worse is what lies beyond this with its whole interval.
MARGIN = 1.02
# Interference binds where the better replicas' good answers are fewer than this share of their
# answers, at these loads; what auto's goodput must then be, as a multiple of theirs.
BINDING_SHARE, BINDING_LOADS, BINDING_GAIN = 0.9, (0.5, 0.95), 1.5
# Where a prefill saturates: the smallest size with this share of the best throughput of any.
# Source: `tinfer tune` chooses its chunk so.
SATURATED_SHARE = 0.95
CHUNKS = tuple(1 << power for power in range(7, 14))

Slos = dict[str, dict[str, Slo]]
# By arm: its figures, or `{"error": ...}` where a request was never answered.
Figures = dict[str, dict[str, Any]]


class Cell(Struct, frozen=True, order=True):
    """A workload at a share of the full load, on so many workers of a box."""

    box: str
    num_workers: int
    workload: str
    load: float


class CellTask(Struct, frozen=True, kw_only=True):
    """One draw of one cell, with everything that a process of its own needs."""

    cell: Cell
    seed: int
    source: Source
    offered_rps: float
    arms: tuple[Arm, ...]
    slos: Slos
    block_tokens: int
    max_tokens: int | None


def simulated(task: CellTask) -> Figures:
    """The figures of all arms on the task's requests."""
    requests = sim_requests(requests_of(task.source), task.block_tokens, task.max_tokens)
    return {arm.name: _figures(arm, requests, task) for arm in task.arms}


def _figures(arm: Arm, requests: Sequence[SimRequest], task: CellTask) -> dict[str, Any]:
    try:
        run = run_arm(arm, requests, task.seed)
    except SimulationError as error:
        return {"error": str(error)}
    return {**figures_of(run, task.slos, task.offered_rps)}


def arms_of(
    box: Box, num_workers: int, config: ServeConfig, scheduler_of: SchedulerOf
) -> tuple[Arm, ...]:
    """All arms on so many workers, half of which prefill; `config` is tinfer's."""
    num_prefill = num_workers // 2
    sizes = (num_prefill, num_workers - num_prefill)
    split = replace(config, route="split")
    return (
        tinfer_arm(AUTO, box, *sizes, config, scheduler_of),
        tinfer_arm(SPLIT, box, *sizes, split, scheduler_of),
        *(baseline_arm(kind, box, *sizes, config) for kind in (HYBRID, *REPLICAS)),
    )


def saturating_chunk(costs: CostModel) -> int:
    """Tokens of a step beyond which a prefill gets hardly any faster, as a power of two."""
    rates = {tokens: tokens / costs.prefill_s(tokens, tokens) for tokens in CHUNKS}
    best = max(rates.values())
    return next(tokens for tokens in CHUNKS if rates[tokens] >= SATURATED_SHARE * best)


# --- what the runs of a cell say -----------------------------------------------------------------


class Verdict(Struct, frozen=True, kw_only=True):
    """One cell over its draws; ratios are auto's to another arm's, paired by draw.

    `e2el` and `throughput` are to the best other arm in that (`best_e2el`, `best_throughput`), and
    None where a figure is missing. `is_worse` says that one of them lies beyond the margin with its
    whole interval, or that auto got stuck or failed more requests than some other arm. `replicas`
    is the better of the two, `good_share` its share of good answers and `goodput` auto's ratio to
    it, see `gain_of`; `binds` where interference does. `failed` counts unanswered requests by arm,
    `errors` holds what got stuck.
    """

    cell: Cell
    num_draws: int
    offered_rps: float
    best_e2el: str
    e2el: Estimate | None
    best_throughput: str
    throughput: Estimate | None
    is_worse: bool
    replicas: str
    good_share: float
    goodput: Estimate | None
    goodput_tight: Estimate | None
    binds: bool
    failed: dict[str, int]
    errors: dict[str, str]


def verdict_of(cell: Cell, offered_rps: float, draws: Sequence[Figures]) -> Verdict:
    """What the draws of a cell say."""
    errors = {arm: str(one[arm]["error"]) for one in draws for arm in one if "error" in one[arm]}
    sound = [arm for arm in ARMS if arm not in errors]
    others = [arm for arm in sound if arm != AUTO]
    e2el = {arm: _values(draws, arm, "mean_e2el_ms") for arm in sound}
    through = {arm: _values(draws, arm, "request_throughput") for arm in sound}
    best_e2el = min(others, key=lambda arm: _log_mean(e2el[arm], math.inf))
    best_throughput = max(others, key=lambda arm: _log_mean(through[arm], -math.inf))
    slower = thinner = None
    if AUTO in sound:
        slower = ratio_of(e2el[AUTO], e2el[best_e2el])
        thinner = ratio_of(through[AUTO], through[best_throughput])
    plain = [arm for arm in REPLICAS if arm in sound] or others
    good = {arm: _values(draws, arm, "goodput_loose") for arm in sound}
    replicas = max(plain, key=lambda arm: (sum(good[arm]), -sum(e2el[arm])))
    share = sum(good[replicas]) / len(draws) / offered_rps
    tight = {arm: _values(draws, arm, "goodput_tight") for arm in (AUTO, replicas) if arm in sound}
    failed = {arm: round(sum(_values(draws, arm, "num_failed"))) for arm in sound}
    # Failures are in no latency.
    fails = AUTO not in sound or failed[AUTO] > min(failed[arm] for arm in others)
    low, high = BINDING_LOADS
    return Verdict(
        cell=cell,
        num_draws=len(draws),
        offered_rps=offered_rps,
        best_e2el=best_e2el,
        e2el=slower,
        best_throughput=best_throughput,
        throughput=thinner,
        is_worse=fails or is_beyond(slower) or is_beyond(inverse(thinner)),
        replicas=replicas,
        good_share=share,
        goodput=gain_of(good[AUTO], good[replicas]) if AUTO in sound else None,
        goodput_tight=gain_of(tight[AUTO], tight[replicas]) if AUTO in sound else None,
        binds=low <= cell.load <= high and share < BINDING_SHARE,
        failed={arm: number for arm, number in failed.items() if number},
        errors=errors,
    )


def gain_of(mine: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """The mean ratio of paired goodputs; where a draw has no good answer that of their sums, which
    has no interval; None where the other side has none in any."""
    paired = ratio_of(mine, theirs)
    if paired is None and sum(theirs) > 0.0:
        return Estimate(sum(mine) / sum(theirs))
    return paired


def is_beyond(ratio: Estimate | None) -> bool:
    """Whether a ratio of which less is better lies beyond the margin with its whole interval; one
    draw has none, and its value counts."""
    if ratio is None:
        return False
    return (ratio.value if ratio.low is None else ratio.low) > MARGIN


def inverse(ratio: Estimate | None) -> Estimate | None:
    """The same ratio the other way round."""
    if ratio is None:
        return None
    if ratio.low is None or ratio.high is None:
        return Estimate(1.0 / ratio.value)
    return Estimate(1.0 / ratio.value, 1.0 / ratio.high, 1.0 / ratio.low)


def distance(verdict: Verdict) -> float:
    """How many times worse than the best other arm, at the most of the two figures."""
    ratios = (verdict.e2el, inverse(verdict.throughput))
    return max((one.value for one in ratios if one is not None), default=math.inf)


def gains(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The cells in which interference binds, the smallest gain first; one that cannot be a ratio,
    since the replicas have no good answer at all, comes last."""
    binding = [one for one in verdicts if one.binds]
    return sorted(binding, key=lambda one: math.inf if one.goodput is None else one.goodput.value)


def _values(draws: Sequence[Mapping[str, Any]], arm: str, name: str) -> list[float]:
    # What is not a number is null once it has been in a file.
    return [math.nan if one[arm][name] is None else one[arm][name] for one in draws]


def _log_mean(values: Sequence[float], missing: float) -> float:
    return sum(math.log(value) if value > 0.0 else missing for value in values) / len(values)
