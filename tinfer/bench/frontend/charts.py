"""Draws what a token costs, by arm and number of streams, as PNG files.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinfer.bench.drawing import new_figure, saved
from tinfer.bench.frontend.summary import Row

_TITLES = {"paced": "at a pace", "full": "at full speed"}


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`per_token.png`, where any tokens were measured, in `folder`, which is made.

    Raises `OSError` where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = [
        (title, mine)
        for mode, title in _TITLES.items()
        if (mine := [row for row in rows if (row.what, row.mode) == ("tokens", mode)])
    ]
    if not panels:
        return []
    figure, all_axes = new_figure(6.0 * len(panels), 4.0, len(panels))
    arms = list(dict.fromkeys(row.arm for row in rows))
    for axes, (title, mine) in zip(all_axes, panels, strict=True):
        streams = sorted({row.streams for row in mine})
        shown = [arm for arm in arms if any(row.arm == arm for row in mine)]
        width = 0.8 / len(shown)
        for place, arm in enumerate(shown):
            known = {row.streams: row for row in mine if row.arm == arm}
            at = [streams.index(num) + (place + 0.5) * width - 0.4 for num in known]
            front = [row.front_us for row in known.values()]
            behind = [row.engines_us for row in known.values()]
            colour = f"C{arms.index(arm)}"
            axes.bar(at, front, width, label=arm, color=colour)
            axes.bar(at, behind, width, bottom=front, color=colour, alpha=0.35)
        axes.set_xticks(range(len(streams)), [str(num) for num in streams])
        axes.set_xlabel("streams")
        axes.set_ylabel("processor time per token, µs (light: engines)")
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small")
    return [saved(figure, folder / "per_token.png")]
