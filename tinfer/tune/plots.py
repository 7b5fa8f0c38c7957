"""Draws a tuning as PNG files. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinfer.tune.chunk import SATURATED_SHARE, throughput
from tinfer.tune.fit import predicted_s
from tinfer.tune.points import StepPoint
from tinfer.tune.tuning import Tuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_MEASURED, _FITTED, _MARK = "tab:blue", "tab:orange", "tab:gray"
# One per prompt length of the decode batches.
_LENGTH_COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple")


def draw_all(tuning: Tuning, folder: Path) -> list[Path]:
    """`prefill.png`, `decode.png` and, where it was measured, `handoff.png`, in `folder`, which is
    made. Raises `OSError` where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _saved(_draw_prefill(tuning), folder / "prefill.png"),
        _saved(_draw_decode(tuning), folder / "decode.png"),
    ]
    if tuning.handoffs:
        drawn.append(_saved(_draw_handoff(tuning), folder / "handoff.png"))
    return drawn


def _figure(width: float, num_columns: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure and its axes side by side, drawn without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(1, num_columns, squeeze=False)
    return figure, list(axes[0])


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path


def _title(tuning: Tuning, what: str) -> str:
    identity = tuning.identity
    threads = f", {identity.num_threads} thread{'s' * (identity.num_threads > 1)}"
    model = tuning.model if len(tuning.model) <= 40 else f"...{tuning.model[-37:]}"
    return f"{what}: {model} on {identity.device}{threads}, {identity.dtype}"


def _draw_prefill(tuning: Tuning) -> Figure:
    points = [point for point in tuning.steps if point.kind == "prefill"]
    figure, (rate, latency) = _figure(11.0, 2, _title(tuning, "prefill"))
    sizes = [point.prefill_tokens for point in points]
    fitted_s = [predicted_s(tuning.costs, point) for point in points]
    rate.plot(sizes, [throughput(point) for point in points], "o-", color=_MEASURED)
    rate.plot(sizes, [n / s for n, s in zip(sizes, fitted_s, strict=True)], "--", color=_FITTED)
    rate.axhline(
        SATURATED_SHARE * tuning.chunk.best_tokens_per_s, color=_MARK, linewidth=0.8, linestyle="--"
    )
    rate.set_ylabel("prompt tokens/s")
    rate.set_ylim(bottom=0)
    latency.plot(
        sizes, [1e3 * point.step_s for point in points], "o-", color=_MEASURED, label="measured"
    )
    latency.plot(sizes, [1e3 * s for s in fitted_s], "--", color=_FITTED, label="fitted costs")
    latency.set_ylabel("step (ms)")
    latency.set_yscale("log", base=10)
    for axes in (rate, latency):
        axes.axvline(tuning.chunk.threshold_tokens, color=_MARK, linestyle=":")
        axes.set_xlabel("prompt tokens in the step")
        _log2_ticks(axes, sizes)
    # Beside its line, on the side where there is room.
    is_left = tuning.chunk.threshold_tokens**2 <= sizes[0] * sizes[-1]
    rate.annotate(
        f"threshold {tuning.chunk.threshold_tokens} ({SATURATED_SHARE:.0%} of the best)\n"
        f"chunk {tuning.chunk.chunk_tokens}",
        (tuning.chunk.threshold_tokens, 0.0),
        xytext=(6 if is_left else -6, 8),
        textcoords="offset points",
        horizontalalignment="left" if is_left else "right",
        fontsize="small",
    )
    latency.legend(fontsize="small")
    return figure


def _draw_decode(tuning: Tuning) -> Figure:
    figure, (step, rate) = _figure(11.0, 2, _title(tuning, "decode"))
    groups = by_kv_length([point for point in tuning.steps if point.kind == "decode"])
    for colour, (kv_tokens, points) in zip(_LENGTH_COLOURS, groups, strict=False):
        nums = [point.num_decodes for point in points]
        fitted_s = [predicted_s(tuning.costs, point) for point in points]
        label = f"about {kv_tokens} KV tokens each"
        step.plot(nums, [1e3 * p.step_s for p in points], "o", color=colour, label=label)
        step.plot(nums, [1e3 * s for s in fitted_s], "--", color=colour, label="its fit")
        rate.plot(nums, [p.num_decodes / p.step_s for p in points], "o", color=colour)
        rate.plot(nums, [n / s for n, s in zip(nums, fitted_s, strict=True)], "--", color=colour)
    step.set_ylabel("step (ms)")
    rate.set_ylabel("output tokens/s")
    all_nums = sorted({point.num_decodes for _, points in groups for point in points})
    for axes in (step, rate):
        axes.set_xlabel("sequences that decode")
        axes.set_ylim(bottom=0)
        _log2_ticks(axes, all_nums)
    step.legend(fontsize="small")
    return figure


def _draw_handoff(tuning: Tuning) -> Figure:
    figure, (axes,) = _figure(6.0, 1, _title(tuning, f"hand-off by {tuning.transport}"))
    points = tuning.handoffs
    sizes = [point.tokens for point in points]
    fitted_s = [tuning.costs.handoff_total_s(tokens) for tokens in sizes]
    axes.plot(sizes, [1e3 * p.handoff_s for p in points], "o", color=_MEASURED, label="measured")
    axes.plot(sizes, [1e3 * s for s in fitted_s], "--", color=_FITTED, label="fitted costs")
    axes.plot(sizes, [1e3 * p.copy_s for p in points], ".:", color=_MARK, label="the copy alone")
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("order to report (ms)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def by_kv_length(points: Sequence[StepPoint]) -> list[tuple[int, list[StepPoint]]]:
    """Decode points by the KV tokens of each sequence, which batches of one prompt length share but
    for the steps of their prompts; shortest first, and in each by the number of sequences."""
    groups: list[tuple[int, list[StepPoint]]] = []
    for point in sorted(points, key=lambda p: p.kv_tokens / p.num_decodes):
        each = point.kv_tokens / point.num_decodes
        if groups and each < 1.5 * groups[-1][0]:
            groups[-1][1].append(point)
        else:
            groups.append((round(each), [point]))
    return [(each, sorted(some, key=lambda p: p.num_decodes)) for each, some in groups]


def _log2_ticks(axes: Axes, values: Sequence[int]) -> None:
    """A tick per power of two that was measured, and the numbers themselves, not exponents."""
    powers = [value for value in values if value & (value - 1) == 0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(powers or list(values), [str(value) for value in powers or values])
    axes.tick_params(axis="x", labelrotation=45 if len(powers) > 7 else 0)
    axes.grid(alpha=0.3)
