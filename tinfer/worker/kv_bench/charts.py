"""Draws the speed of a hand-off over its size, as a PNG file.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinfer.worker.kv_bench.copies import Row

_DPI = 120
_STYLES = {"ours": "-", "pieces": "--", "one": ":"}


def draw(rows: Sequence[Row], folder: Path) -> Path:
    """`handoff.png` in `folder`, which is made: a panel per transport and layout.

    Raises `OSError` where the folder cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    panels = list(dict.fromkeys((row.transport, row.layout) for row in rows))
    pages = list(dict.fromkeys(row.page_kib for row in rows))
    sizes_mib = sorted({row.size_kib / 1024 for row in rows})
    figure = Figure(figsize=(4.5 * max(1, len(panels)) + 2.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (transport, layout) in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0], panels, strict=False
    ):
        for page_kib in pages:
            mine = [
                row
                for row in rows
                if (row.transport, row.layout, row.page_kib) == (transport, layout, page_kib)
            ]
            for name, style in _STYLES.items():
                known = [row for row in mine if name in row.gb_s]
                axes.plot(
                    [row.size_kib / 1024 for row in known],
                    [row.gb_s[name] for row in known],
                    style,
                    marker="o",
                    markersize=3,
                    color=f"C{pages.index(page_kib)}",
                    label=f"{name}, pages of {page_kib} KiB",
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes_mib, [f"{size_mib:g}" for size_mib in sizes_mib])
        axes.set_title(f"{transport}, {layout}")
        axes.set_xlabel("hand-off, MiB")
        axes.set_ylabel("GB/s")
        axes.grid(alpha=0.3)
    if panels:
        axes.set_ylim(bottom=0)  # of all panels, once all have drawn
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize="small")
    path = folder / "handoff.png"
    figure.savefig(path, dpi=_DPI)
    return path
