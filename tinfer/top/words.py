"""Figures in words of a few characters; `NOTHING` stands for what there is none of."""

from __future__ import annotations

from datetime import timedelta

from rich import filesize

NOTHING = "\N{EN DASH}"


def seconds(value: float | None) -> str:
    """To three digits, in milliseconds below a second."""
    if value is None:
        return NOTHING
    return f"{_three(value * 1e3)} ms" if value < 0.9995 else f"{_three(value)} s"


def duration(value: float | None) -> str:
    """Hours, minutes and seconds, with days where there are any."""
    return NOTHING if value is None else str(timedelta(seconds=int(value)))


def rate(value: float | None) -> str:
    """Per second."""
    return NOTHING if value is None else f"{_three(value)}/s"


def share(value: float | None) -> str:
    """In percent."""
    return NOTHING if value is None else f"{value:.0%}"


def count(value: float) -> str:
    """A whole number, with its thousands told apart."""
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in powers of 1000."""
    return NOTHING if value is None else filesize.decimal(round(value))


def tokens(value: float | None) -> str:
    """A mean number of tokens."""
    return NOTHING if value is None else f"{_three(value)} tokens"


def _three(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}" if value else "0"
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
