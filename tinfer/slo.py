"""The option `--slo`: bounds on TTFT and TPOT."""

from __future__ import annotations


def slo_bounds_s(slo: tuple[str, ...]) -> dict[str, float]:
    """The bounds in seconds, by metric, of words as `ttft:500` and `ttft:500,tpot:50` (ms).

    Raises `ValueError` for what is none.
    """
    bounds: dict[str, float] = {}
    for pair in ",".join(slo).split(",") if slo else ():
        name, _, text = pair.partition(":")
        bound_ms = float(text)
        if name in bounds or bound_ms <= 0:
            raise ValueError(f"{name} has two bounds" if name in bounds else f"{pair} is no time")
        bounds[name] = bound_ms / 1e3
    return bounds
