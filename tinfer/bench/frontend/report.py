"""The result as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinfer.bench.frontend.summary import Ratio, Row

_TITLES = {
    ("tokens", "paced"): "At a pace (us of processor time per token)",
    ("tokens", "full"): "At full speed (us of processor time per token)",
    ("requests", "full"): "Requests of one token, 64 at a time (us of processor time per request)",
    ("unloaded", "unloaded"): "One stream, 20 ms a step: what is added to the engine's own time",
    ("prompts", "paced"): "While prompts of 20,000 tokens arrive",
}


def lines_of(rows: Sequence[Row], ratios: Sequence[Ratio]) -> Iterator[str]:
    """All tables."""
    for (what, mode), title in _TITLES.items():
        mine = [row for row in rows if (row.what, row.mode) == (what, mode)]
        if mine:
            yield title
            yield from _table(what, sorted(mine, key=lambda row: (row.streams, row.arm)))
            yield ""
    if ratios:
        yield "Ratios (least and largest over the repetitions)"
        for ratio in ratios:
            of = "request" if ratio.what == "requests" else "token"
            yield (
                f"  {ratio.arm} / {ratio.to}, {ratio.figure} per {of}, {ratio.mode}, "
                f"{ratio.streams} streams: {ratio.median:.2f} [{ratio.least:.2f}, "
                f"{ratio.largest:.2f}]"
            )


def _table(what: str, rows: Sequence[Row]) -> Iterator[str]:
    if what == "unloaded":
        yield f"  {'arm':<14}{'TTFT ms':>10}{'ITL p50 ms':>12}{'ITL p99 ms':>12}"
        for row in rows:
            values = (row.added_ttft_ms, row.added_itl_p50_ms, row.added_itl_p99_ms)
            shown = [f"{value or 0.0:.2f}" for value in values]
            yield f"  {row.arm:<14}{shown[0]:>10}{shown[1]:>12}{shown[2]:>12}"
        return
    if what == "prompts":
        yield f"  {'arm':<14}{'streams':>8}{'tokens/s':>10}{'ITL p99 ms':>12}{'loop lag <= ms':>16}"
        for row in rows:
            yield (
                f"  {row.arm:<14}{row.streams:>8}{row.tokens_per_s:>10.0f}"
                f"{row.itl_p99_ms or 0.0:>12.1f}{row.longest_lag_ms or 0.0:>16.1f}"
            )
        return
    speed = "requests/s" if what == "requests" else "tokens/s"
    yield (
        f"  {'arm':<14}{'streams':>8}{speed:>12}{'front':>9}{'net':>9}{'engines':>9}{'whole':>9}"
        f"{'client':>9}{'events':>8}"
    )
    for row in rows:
        rate = row.requests_per_s if what == "requests" else row.tokens_per_s
        net = "" if row.net_front_us is None else f"{row.net_front_us:.1f}"
        yield (
            f"  {row.arm:<14}{row.streams:>8}{rate:>12.0f}{row.front_us:>9.1f}{net:>9}"
            f"{row.engines_us:>9.1f}{row.whole_us:>9.1f}{row.client_us:>9.1f}"
            f"{row.events_per_token:>8.2f}"
        )
