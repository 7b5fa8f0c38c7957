"""The answer of one check, and how numbers in it are written."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Level = Literal["ok", "warning", "fault"]


class Finding(Struct, frozen=True):
    """One line of the report.

    `check` is the check's name, `found` what is the case (further lines, as of a matrix, follow
    after a line break), `advice` what to do about it: empty where nothing is to be done.
    """

    check: str
    level: Level
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    """tinfer serves, but less well, or not with every option."""
    return Finding(check, "warning", found, advice)


def fault(check: str, found: str, advice: str) -> Finding:
    """tinfer cannot serve, or something broken needs a person."""
    return Finding(check, "fault", found, advice)


def size(num_bytes: float) -> str:
    """Bytes for a reader, in binary units: "512 MiB", "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 100 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
