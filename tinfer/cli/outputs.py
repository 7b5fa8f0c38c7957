"""Where results go: the options that say so, and a look before the work at what fails after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tinfer.errors import StartError

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def json_option(
    words: str = "Write the result here; - is standard output, and then only JSON.",
) -> _Decorator:
    """`--json FILE`, as `json_path`."""
    return click.option("--json", "json_path", metavar="FILE", help=words)


def plot_option(words: str) -> _Decorator:
    """`--plot DIR`, as `plot_dir`."""
    folder = click.Path(file_okay=False, path_type=Path)
    return click.option("--plot", "plot_dir", type=folder, metavar="DIR", help=words)


def check_writable(json_path: str | None, plot_dir: Path | None) -> None:
    """Nothing is made yet; `-` and None are no files. Raises `StartError` naming the path."""
    if json_path not in (None, "-"):
        path = Path(str(json_path))
        place = path if path.exists() else path.absolute().parent
        if path.is_dir() or not place.exists() or not _takes_files(place):
            raise StartError(f"cannot write {path}")
    if plot_dir is not None:
        place = plot_dir.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not _takes_files(place):
            raise StartError(f"cannot write to {plot_dir}")


def _takes_files(place: Path) -> bool:
    return os.access(place, os.W_OK | os.X_OK if place.is_dir() else os.W_OK)
