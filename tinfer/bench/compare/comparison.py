"""From samples to what is reported: per point a baseline, figures and ratios with intervals,
verdicts, and the losses first. Pure.

The baseline of a point is the replica arm with the higher goodput at the loose SLO there (where
both have the same, at the tight one; then the one with the lower mean E2EL), or the arm that
--baseline names: a baseline picked for being good makes every other arm look worse by what was luck
in it, which is the safe side. Where its goodput at an SLO is under a tenth of the offered rate,
that goodput has absolute values and no ratio, which would be one over nearly nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from tinfer.bench.compare.bootstrap import Estimate, draw, estimate
from tinfer.bench.compare.metrics import (
    BETWEEN_RUNS,
    GOODPUTS,
    METRICS,
    PAPER_FORM,
    RECIPROCAL_FORM,
    figures_of,
    ratios_of,
)
from tinfer.bench.compare.samples import Floats, Sample
from tinfer.bench.compare.steps import Point

MIN_BASELINE_SHARE = 0.1

Verdict = Literal["better", "worse", "unclear"]


class Compared(Struct, frozen=True, kw_only=True):
    """One metric of one arm at one point.

    `verdict`: which side of the baseline the whole interval lies on; "unclear" where it lies on
    both or there is none, None for the baseline itself. `ratio` is None there too, and where the
    baseline has too little; `value` is None where nothing was measured.
    """

    value: Estimate | None
    ratio: Estimate | None
    verdict: Verdict | None


class PointResult(Struct, frozen=True, kw_only=True):
    """All arms at one point; only repetitions that every arm has ended are in it."""

    workload: str
    load: float
    offered_rps: float
    baseline: str
    num_repetitions: int
    num_failed: dict[str, int]
    arms: dict[str, dict[str, Compared]]


class Line(Struct, frozen=True, kw_only=True):
    """A metric of one arm at one point in which its interval lies on one side of the baseline."""

    arm: str
    workload: str
    load: float
    metric: str
    baseline: str
    value: Estimate | None
    baseline_value: Estimate | None
    ratio: Estimate | None


def compare_point(
    point: Point,
    offered_rps: float,
    samples: Mapping[str, Sequence[Sample]],
    candidates: Sequence[str],
    num_resamples: int,
    seed: int,
) -> PointResult | None:
    """All arms at one point, beside the best of `candidates`; None before a whole repetition.

    The i-th samples of all arms are of the same requests.
    """
    num = min(len(runs) for runs in samples.values())
    if num == 0:
        return None
    runs = {arm: list(of_arm[:num]) for arm, of_arm in samples.items()}
    any_arm = next(iter(runs.values()))
    weights = draw([one.num_requests for one in any_arm], num_resamples, seed)
    figures = {arm: figures_of(of_arm, weights, offered_rps) for arm, of_arm in runs.items()}
    baseline = max(candidates, key=lambda arm: _merit(figures[arm]))
    return PointResult(
        workload=point.workload,
        load=point.load,
        offered_rps=offered_rps,
        baseline=baseline,
        num_repetitions=num,
        num_failed={
            arm: sum(int((~one.ok).sum()) for one in of_arm) for arm, of_arm in runs.items()
        },
        arms={
            arm: _compared(figures[arm], figures[baseline], arm == baseline, offered_rps, num)
            for arm in figures
        },
    )


def _merit(figures: Mapping[str, Floats]) -> tuple[float, float, float]:
    """What makes the better replica arm: under light load both have all answers good."""
    loose, tight, e2el_ms = (
        float(figures[name][0]) for name in ("goodput_loose", "goodput_tight", "mean_e2el_ms")
    )
    return loose, tight, -e2el_ms


def _compared(
    figures: Mapping[str, Floats],
    baseline: Mapping[str, Floats],
    is_baseline: bool,
    offered_rps: float,
    num_repetitions: int,
) -> dict[str, Compared]:
    ratios = ratios_of(figures, baseline)
    compared = {}
    for name, metric in METRICS.items():
        value = None if name == PAPER_FORM else estimate(figures[name])
        ratio = None if is_baseline else estimate(ratios[name])
        if name in GOODPUTS and baseline[name][0] < MIN_BASELINE_SHARE * offered_rps:
            ratio = None
        if num_repetitions == 1 and name in BETWEEN_RUNS:
            value, ratio = _bare(value), _bare(ratio)
        verdict: Verdict | None = None
        if ratio is not None:
            verdict = _side(ratio, metric.higher_is_better)
        elif not is_baseline and value is not None and name != PAPER_FORM:
            verdict = _apart(value, estimate(baseline[name]), metric.higher_is_better)
        compared[name] = Compared(value=value, ratio=ratio, verdict=verdict)
    return compared


def _bare(one: Estimate | None) -> Estimate | None:
    return None if one is None else Estimate(one.value, None, None)


def _side(ratio: Estimate, higher_is_better: bool) -> Verdict:
    if ratio.low is None or ratio.high is None or ratio.low <= 1.0 <= ratio.high:
        return "unclear"
    return "better" if (ratio.low > 1.0) == higher_is_better else "worse"


def _apart(value: Estimate, other: Estimate | None, higher_is_better: bool) -> Verdict:
    """Without a ratio: where the two intervals do not even touch."""
    if other is None or None in (value.low, value.high, other.low, other.high):
        return "unclear"
    above = (value.low or 0.0) > (other.high or 0.0)
    below = (value.high or 0.0) < (other.low or 0.0)
    if not above and not below:
        return "unclear"
    return "better" if above == higher_is_better else "worse"


def lines_of(points: Sequence[PointResult], verdict: Verdict, arms: Sequence[str]) -> list[Line]:
    """What these arms have with this verdict, the farthest from the baseline first."""
    lines = []
    for point in points:
        for arm in arms:
            for name, one in point.arms[arm].items():
                if one.verdict == verdict:
                    lines.append(
                        Line(
                            arm=arm,
                            workload=point.workload,
                            load=point.load,
                            metric=name,
                            baseline=point.baseline,
                            value=one.value,
                            baseline_value=point.arms[point.baseline][name].value,
                            ratio=one.ratio,
                        )
                    )
    return sorted(lines, key=_distance, reverse=True)


def _distance(line: Line) -> float:
    """How many times better or worse; a line without a ratio is beyond all others.

    perf/$ follows from other lines and comes last: the paper's form is no multiple of anything, it
    goes below 0 where a mean E2EL more than doubles.
    """
    if line.metric in (PAPER_FORM, RECIPROCAL_FORM):
        return 0.0
    if line.ratio is None or line.ratio.value <= 0:
        return float("inf")
    return max(line.ratio.value, 1.0 / line.ratio.value)
