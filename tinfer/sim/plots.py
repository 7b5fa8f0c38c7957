"""Draws simulations as PNG files: latency distributions, who computed what, and what a plan ranks.

matplotlib is imported when something is drawn, and draws without a window system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinfer.sim.results import Floats, RequestResult, SimRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
_MS = 1000.0
_LATENCIES = ("ttft", "tpot", "itl", "e2el")
# From matplotlib's "tab10", told apart by the colour-blind too.
_COLOURS = {"prefill": "tab:orange", "hand-off": "tab:gray", "decode": "tab:blue"}


def draw_runs(runs: Mapping[str, SimRun], folder: Path) -> list[Path]:
    """Latencies of all arms together, and a timeline of each, in `folder`, which is made.

    Raises `OSError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [saved(_latencies(runs), folder / "latency.png")]
    for name, run in runs.items():
        drawn.append(saved(_timeline(name, run), folder / f"timeline-{name}.png"))
    return drawn


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def saved(made: Figure, path: Path) -> Path:
    # Nothing of the date or the version: equal runs give equal pictures.
    made.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _latencies(runs: Mapping[str, SimRun]) -> Figure:
    made, panels = figure(4.2 * len(_LATENCIES), 3.8, columns=len(_LATENCIES))
    for axes, metric in zip(panels, _LATENCIES, strict=True):
        for name, run in runs.items():
            values_ms = np.sort(_MS * _values_s(run, metric))
            if len(values_ms):
                shares = np.arange(1, len(values_ms) + 1) / len(values_ms)
                axes.plot(values_ms, shares, drawstyle="steps-post", label=name)
        axes.set_title(metric.upper())
        axes.set_xlabel("ms")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share")
    panels[-1].legend(fontsize="small")
    return made


def _values_s(run: SimRun, metric: str) -> Floats:
    if metric == "itl":
        return run.itl_s[run.itl_s > 0]
    values = [getattr(one, f"{metric}_s") for one in run.requests if one.ok]
    return np.array([value for value in values if value is not None], dtype=np.float64)


# --- who computed what ---------------------------------------------------------------------------


def spans_of(requests: Sequence[RequestResult]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By worker and phase: from when to when each request was in it there.

    A prefill is from being sent to the worker to the first token, a hand-off from there until the
    blocks are installed, a decode the rest.
    """
    spans: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in requests:
        if one.started_s is None or one.first_token_s is None or one.last_token_s is None:
            continue
        first, last = one.workers[0], one.workers[-1]
        moved_s = one.first_token_s + (one.handoff_s or 0.0)
        for worker, phase, span in (
            (first, "prefill", (one.started_s, one.first_token_s)),
            (last, "hand-off", (one.first_token_s, moved_s)),
            (last, "decode", (moved_s, one.last_token_s)),
        ):
            if span[1] > span[0]:
                by_phase = spans.setdefault(worker, {phase: [] for phase in _COLOURS})
                by_phase[phase].append(span)
    return dict(sorted(spans.items()))


def counts_at(spans: Sequence[tuple[float, float]], times_s: Floats) -> Floats:
    """How many of the spans hold each time; their end is not in them."""
    starts, ends = (np.sort([span[side] for span in spans]) for side in (0, 1))
    begun = np.searchsorted(starts, times_s, "right")
    return (begun - np.searchsorted(ends, times_s, "right")).astype(np.float64)


def _timeline(name: str, run: SimRun) -> Figure:
    """Per worker, the requests in each phase over time, one upon the other."""
    spans = spans_of(run.requests)
    made, panels = figure(11.0, 1.0 + 1.6 * max(1, len(spans)), rows=max(1, len(spans)))
    times_s = np.linspace(0.0, max(run.duration_s, 1e-9), 1200)
    for axes, (worker, by_phase) in zip(panels, spans.items(), strict=False):
        counts = [counts_at(by_phase[phase], times_s) for phase in _COLOURS]
        axes.stackplot(times_s, counts, labels=list(_COLOURS), colors=list(_COLOURS.values()))
        axes.set_ylabel(worker)
        axes.set_xlim(0.0, times_s[-1])
        axes.grid(alpha=0.3)
    panels[0].set_title(f"{name}: requests in each phase")
    panels[-1].set_xlabel("seconds from the start of the run")
    if spans:
        panels[0].legend(loc="upper right", fontsize="small")
    return made


# --- a plan --------------------------------------------------------------------------------------


def draw_bars(title: str, words: str, bars: Sequence[tuple[str, float, str]], path: Path) -> Path:
    """Horizontal bars of (label, value, colour), the first one on top. Raises `OSError`."""
    made, (axes,) = figure(10.0, 1.2 + 0.28 * max(1, len(bars)))
    axes.barh(
        range(len(bars)), [value for _, value, _ in bars], color=[colour for *_, colour in bars]
    )
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(words)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    return saved(made, path)
