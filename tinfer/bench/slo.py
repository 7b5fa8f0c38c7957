"""Service level objectives: what makes an answer good, in vLLM's spelling `ttft:100 tpot:50`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from msgspec import Struct

from tinfer.bench.outcome import Outcome

SLO_METRICS = ("ttft", "tpot", "e2el")


class Slo(Struct, frozen=True, kw_only=True):
    """Upper bounds in milliseconds; None bounds nothing. An answer of one token has TPOT 0."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by metric."""
        pairs = ((name, getattr(self, name)) for name in SLO_METRICS)
        return {name: bound for name, bound in pairs if bound is not None}

    def met_by(self, outcome: Outcome, wait_s: float = 0.0) -> bool:
        """Whether the answer came whole and met every bound, `wait_s` before its sending included.

        The wait counts in TTFT and E2EL.
        """
        if not outcome.ok:
            return False
        seen_s = {
            "ttft": outcome.ttft_s + wait_s,
            "tpot": outcome.tpot_s or 0.0,
            "e2el": outcome.e2el_s + wait_s,
        }
        return all(seen_s[name] <= bound / 1000 for name, bound in self.bounds().items())


def parse_slo(pairs: Iterable[str]) -> Slo | None:
    """The SLO that `NAME:MILLISECONDS` pairs say; None for no pair. Raises `ValueError`."""
    bounds: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        if name not in SLO_METRICS:
            raise ValueError(f"{pair!r}: the metric must be one of {', '.join(SLO_METRICS)}")
        if name in bounds:
            raise ValueError(f"{name} has two bounds")
        try:
            bound = float(text)
        except ValueError:
            bound = math.nan
        if not 0 <= bound < math.inf:
            raise ValueError(f"{pair!r} is not NAME:MILLISECONDS")
        bounds[name] = bound
    return Slo(**bounds) if bounds else None
