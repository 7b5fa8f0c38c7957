"""Where results go, looked at before the work: what would fail after it fails before it."""

from __future__ import annotations

import os
from pathlib import Path

from tinfer.errors import StartError


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
