"""What every picture of a benchmark begins and ends with.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120


def new_figure(width: float, height: float, num_columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its axes side by side, drawn without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_columns, squeeze=False)[0])


def saved(figure: Figure, path: Path) -> Path:
    """Write it as PNG. Raises `OSError`."""
    figure.savefig(path, dpi=_DPI)
    return path
