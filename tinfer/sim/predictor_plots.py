"""Draws predictors side by side: order, error, and whether their intervals hold what they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinfer.sim.plots import figure, saved
from tinfer.sim.scores import INTERVALS, Score


def draw(scores: Mapping[str, Score], folder: Path) -> Path:
    """One picture, `predictors.png` in `folder`, which is made. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    made, (order, error, held) = figure(13.0, 3.8, columns=3)
    names = list(scores)
    order.bar(names, [score.kendall_tau or 0.0 for score in scores.values()])
    order.set_ylabel("Kendall's tau")
    error.bar(names, [score.pinball_tokens for score in scores.values()])
    error.set_ylabel("mean pinball loss (tokens)")
    for axes in (order, error):
        axes.tick_params("x", rotation=40)
    held.plot((0.0, 1.0), (0.0, 1.0), color="tab:gray", linewidth=1)
    for name, score in scores.items():
        held.plot(INTERVALS, list(score.coverage.values()), marker="o", label=name)
    held.set_xlabel("central interval, as predicted")
    held.set_ylabel("share of answers within it")
    held.legend(fontsize="small")
    return saved(made, folder / "predictors.png")
