"""Draws what `figures` prepared as PNG files. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinfer.bench.drawing import new_figure, saved
from tinfer.bench.figures import (
    Curve,
    Lane,
    Phase,
    goodput_over_load,
    label_of,
    latency_cdfs,
    timeline,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From matplotlib's "tab10", told apart by the colour-blind too.
_COLOURS: dict[Phase, str] = {"prefill": "tab:orange", "hand-off": "tab:gray", "decode": "tab:blue"}
_ROW_INCHES = 0.12
_LANE_GAP_ROWS = 2
_MAX_TIMELINE_INCHES = 30.0


def draw_all(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Every picture that these results have the numbers for, in `folder`, which is made.

    Latency distributions and timelines need results with records (--save-detailed), a timeline
    those of a tinfer server with traces, and goodput an SLO and a load that is not all at once.
    Raises `OSError` where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if cdfs := latency_cdfs(results):
        drawn.append(saved(_draw_cdfs(cdfs), folder / "latency.png"))
    if curves := goodput_over_load(results):
        drawn.append(saved(_draw_goodput(curves), folder / "goodput.png"))
    for number, result in enumerate(results):
        if lanes := timeline(result.get("records", ())):
            name = "timeline.png" if len(results) == 1 else f"timeline-{number}.png"
            drawn.append(saved(_draw_timeline(lanes, label_of(result)), folder / name))
    return drawn


def _draw_cdfs(cdfs: Mapping[str, Sequence[Curve]]) -> Figure:
    figure, panels = new_figure(4.5 * len(cdfs), 3.8, len(cdfs))
    for axes, (metric, curves) in zip(panels, cdfs.items(), strict=True):
        for curve in curves:
            axes.plot(curve.x, curve.y, drawstyle="steps-post", label=curve.label)
        axes.set_title(metric)
        axes.set_xlabel(f"{metric} (ms)")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        if min(curve.x[0] for curve in curves) > 0:
            axes.set_xscale("log")
    panels[0].set_ylabel("share of requests")
    panels[-1].legend(fontsize="small")
    return figure


def _draw_goodput(curves: Sequence[Curve]) -> Figure:
    figure, (axes,) = new_figure(6.0, 4.2)
    for curve in curves:
        axes.plot(curve.x, curve.y, marker="o", label=curve.label)
    highest = max(curve.x[-1] for curve in curves)
    axes.plot([0, highest], [0, highest], color="gray", linestyle=":", label="every request good")
    axes.set_xlabel("offered load (requests/s)")
    axes.set_ylabel("goodput (requests/s that meet the SLO)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _draw_timeline(lanes: Sequence[Lane], title: str) -> Figure:
    num_rows = sum(lane.num_rows + _LANE_GAP_ROWS for lane in lanes)
    figure, (axes,) = new_figure(12.0, min(_MAX_TIMELINE_INCHES, 1.5 + _ROW_INCHES * num_rows))
    at_row = 0
    ticks = []
    for lane in lanes:
        for (row, phase), bars in _bars(lane).items():
            axes.broken_barh(bars, (at_row + row, 0.9), facecolors=_COLOURS[phase])
        ticks.append(at_row + lane.num_rows / 2)
        at_row += lane.num_rows + _LANE_GAP_ROWS
    axes.set_yticks(ticks, [lane.worker for lane in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the start of the run")
    axes.set_title(title)
    _phase_legend(axes)
    return figure


def _bars(lane: Lane) -> dict[tuple[int, Phase], list[tuple[float, float]]]:
    """Start and length of the spans of each row and phase, which are drawn in one go."""
    bars: defaultdict[tuple[int, Phase], list[tuple[float, float]]] = defaultdict(list)
    for span in lane.spans:
        bars[span.row, span.phase].append((span.start_s, span.end_s - span.start_s))
    return bars


def _phase_legend(axes: Axes) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=phase) for phase, colour in _COLOURS.items()]
    axes.legend(handles=handles, loc="upper right", fontsize="small")
