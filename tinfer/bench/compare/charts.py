"""Draws a comparison as PNG files: goodput over load, latency distributions, ratios with intervals.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct, structs

from tinfer.bench.compare.bootstrap import Estimate
from tinfer.bench.compare.comparison import PointResult
from tinfer.bench.compare.metrics import METRICS
from tinfer.bench.compare.recorded import Run
from tinfer.bench.compare.samples import Floats
from tinfer.bench.drawing import new_figure, saved
from tinfer.bench.figures import Curve, cdf

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RATIOS = (
    *("goodput_loose", "goodput_tight", "mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms"),
    *("mean_e2el_ms", "p99_e2el_ms", "perf_per_dollar_paper", "perf_per_dollar_reciprocal"),
)
_LATENCIES = ("ttft", "tpot", "itl", "e2el")


class Bar(Struct, frozen=True):
    """A ratio and its interval; `row` is its place from the top."""

    row: int
    arm: str
    value: float
    low: float
    high: float


def goodput_curves(
    points: Sequence[PointResult], workload: str, metric: str
) -> dict[str, tuple[Curve, list[float], list[float]]]:
    """By arm: goodput over the offered rate, and how far the interval goes below and above."""
    curves = {}
    mine = sorted((one for one in points if one.workload == workload), key=lambda one: one.load)
    for arm in mine[0].arms if mine else ():
        known = [
            (point.offered_rps, value)
            for point in mine
            if (value := point.arms[arm][metric].value) is not None
        ]
        below = [value.value - _bounds(value)[0] for _, value in known]
        above = [_bounds(value)[1] - value.value for _, value in known]
        curve = Curve(arm, [rate for rate, _ in known], [value.value for _, value in known])
        curves[arm] = (curve, [max(0.0, one) for one in below], [max(0.0, one) for one in above])
    return curves


def latency_curves(runs: Sequence[Run], metric: str) -> list[Curve]:
    """One distribution per arm, in milliseconds, over all repetitions."""
    by_arm: dict[str, list[Floats]] = {}
    for run in runs:
        values = run.sample.itl_s if metric == "itl" else run.sample.latency_s[metric]
        by_arm.setdefault(run.step.arm, []).append(values)
    curves = []
    for arm, of_arm in sorted(by_arm.items()):
        pooled = np.concatenate(of_arm)
        known = pooled[~np.isnan(pooled)]
        if len(known):
            curves.append(cdf(arm, (1000.0 * known).tolist()))
    return curves


def ratio_bars(point: PointResult) -> tuple[list[str], list[Bar]]:
    """Words of each row, and the bars: one per arm with a ratio.

    The axis is logarithmic: a ratio that is not above 0 has no place on it, and an interval that
    goes down to 0 is cut at a hundredth of the ratio.
    """
    words = [METRICS[name].words for name in _RATIOS]
    bars = [
        Bar(row, arm, ratio.value, *_bounds(ratio))
        for row, name in enumerate(_RATIOS)
        for arm in point.arms
        if arm != point.baseline and (ratio := point.arms[arm][name].ratio) is not None
    ]
    shown = [bar for bar in bars if bar.value > 0]
    return words, [structs.replace(bar, low=max(bar.low, bar.value / 100)) for bar in shown]


def _bounds(one: Estimate) -> tuple[float, float]:
    """Of its interval, or the figure itself where it has none."""
    low = one.value if one.low is None else one.low
    return low, one.value if one.high is None else one.high


def draw_all(points: Sequence[PointResult], runs: Sequence[Run], folder: Path) -> list[Path]:
    """Every picture there are numbers for, in `folder`, which is made. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        saved(_goodput(points, workload), folder / f"goodput-{workload}.png")
        for workload in dict.fromkeys(one.workload for one in points)
    ]
    for point in points:
        name = f"{point.workload}-{point.load:g}.png"
        mine = [
            run
            for run in runs
            if (run.step.point.workload, run.step.point.load) == (point.workload, point.load)
        ]
        drawn.append(saved(_latencies(mine, point), folder / f"latency-{name}"))
        drawn.append(saved(_ratios(point), folder / f"ratios-{name}"))
    return drawn


def _goodput(points: Sequence[PointResult], workload: str) -> Figure:
    figure, panels = new_figure(11.0, 4.2, 2)
    colours = _colours(points[0])
    for axes, level in zip(panels, ("loose", "tight"), strict=True):
        highest = 0.0
        curves = goodput_curves(points, workload, f"goodput_{level}")
        for curve, below, above in curves.values():
            axes.errorbar(
                curve.x,
                curve.y,
                yerr=[below, above],
                marker="o",
                capsize=3,
                label=curve.label,
                color=colours[curve.label],
            )
            highest = max([highest, *curve.x])
        axes.plot([0, highest], [0, highest], color="gray", linestyle=":", label="all good")
        axes.set_title(f"{workload}: goodput at the {level} SLO")
        axes.set_xlabel("offered load (requests/s)")
        axes.set_ylabel("good requests/s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize="small")
    return figure


def _latencies(runs: Sequence[Run], point: PointResult) -> Figure:
    figure, panels = new_figure(4.2 * len(_LATENCIES), 3.8, len(_LATENCIES))
    colours = _colours(point)
    for axes, metric in zip(panels, _LATENCIES, strict=True):
        for curve in latency_curves(runs, metric):
            colour = colours[curve.label]
            axes.plot(curve.x, curve.y, drawstyle="steps-post", label=curve.label, color=colour)
        axes.set_title(f"{metric.upper()}, {point.workload} at {point.load:g}")
        axes.set_xlabel("ms")
        _logarithmic(axes)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share")
    if runs:
        panels[-1].legend(fontsize="small")
    return figure


def _ratios(point: PointResult) -> Figure:
    words, bars = ratio_bars(point)
    figure, (axes,) = new_figure(8.0, 5.0, 1)
    arms = list(dict.fromkeys(bar.arm for bar in bars))
    place, colours = _places(arms), _colours(point)
    for arm in arms:
        mine = [bar for bar in bars if bar.arm == arm]
        axes.errorbar(
            [bar.value for bar in mine],
            [bar.row + place(arm) for bar in mine],
            xerr=[[bar.value - bar.low for bar in mine], [bar.high - bar.value for bar in mine]],
            linestyle="",
            marker="o",
            capsize=3,
            label=arm,
            color=colours[arm],
        )
    axes.axvline(1.0, color="gray", linestyle=":")
    axes.set_yticks(range(len(words)), words)
    axes.invert_yaxis()
    _logarithmic(axes)
    axes.set_xlabel(f"ratio to {point.baseline}, with 95 % interval")
    axes.set_title(f"{point.workload} at {point.load:g} of full load")
    axes.grid(alpha=0.3, axis="x")
    if arms:
        axes.legend(fontsize="small")
    return figure


def _colours(point: PointResult) -> dict[str, str]:
    """An arm has the same colour in every picture of a comparison."""
    return {arm: f"C{number}" for number, arm in enumerate(point.arms)}


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")


def _places(arms: Sequence[str]) -> Callable[[str], float]:
    """Where an arm's mark lies within its row, so that none hides another."""
    offsets: Mapping[str, float] = {
        arm: 0.6 * (number + 0.5) / len(arms) - 0.3 for number, arm in enumerate(arms)
    }
    return offsets.__getitem__
