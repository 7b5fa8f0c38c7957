"""Medians over the repetitions, and what one arm costs as a multiple of another.

A ratio is the median of the ratios within each repetition, since the box changes from one to the
next more than within one; beside it stand the least and the largest of them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from tinfer.bench.frontend.options import MASTERS, VLLM, Kind
from tinfer.bench.frontend.points import Measured, Point

Figure = Callable[[Measured], float]


class Row(Struct, frozen=True, kw_only=True):
    """Medians of one arm at one point; times in microseconds of processor time.

    `front_us`, `engines_us`, `whole_us`, `client_us` are per delivered token, and for `requests`
    per request. `net_front_us` is without what the requests themselves cost, where that is known.
    `client_share` is of one core.
    """

    arm: Kind
    what: str
    mode: str
    streams: int
    tokens_per_s: float
    requests_per_s: float
    events_per_token: float
    front_us: float
    engines_us: float
    whole_us: float
    client_us: float
    client_share: float
    net_front_us: float | None = None
    ttft_p50_ms: float
    itl_p50_ms: float | None = None
    itl_p99_ms: float | None = None
    added_ttft_ms: float | None = None
    added_itl_p50_ms: float | None = None
    added_itl_p99_ms: float | None = None
    longest_lag_ms: float | None = None


class Ratio(Struct, frozen=True, kw_only=True):
    """`arm`'s figure over that of `to`; "vllm" is the one with the lower figure of both."""

    arm: Kind
    to: str
    figure: str
    what: str
    mode: str
    streams: int
    median: float
    least: float
    largest: float


def rows_of(measured: Sequence[Measured]) -> list[Row]:
    """One per arm and point, in the order in which they were measured first."""
    groups: defaultdict[tuple[Kind, Point], list[Measured]] = defaultdict(list)
    for one in measured:
        groups[one.arm, one.point].append(one)
    per_request_us = {
        arm: _median(group, _front_us)
        for (arm, point), group in groups.items()
        if point.what == "requests"
    }
    return [
        _row(arm, point, group, per_request_us.get(arm)) for (arm, point), group in groups.items()
    ]


def _row(arm: Kind, point: Point, group: list[Measured], request_us: float | None) -> Row:
    net_us = None
    if request_us is not None and point.what == "tokens":
        net_us = _median(group, _front_us) - request_us * point.num_requests / group[0].num_tokens
    return Row(
        arm=arm,
        what=point.what,
        mode=point.mode,
        streams=point.streams,
        tokens_per_s=_median(group, lambda one: one.num_tokens / one.duration_s),
        requests_per_s=_median(group, lambda one: one.point.num_requests / one.duration_s),
        events_per_token=_median(group, lambda one: one.num_events / one.num_tokens),
        front_us=_median(group, _front_us),
        engines_us=_median(group, lambda one: 1e6 * one.engines_s / one.num_tokens),
        whole_us=_median(group, _whole_us),
        client_us=_median(group, lambda one: 1e6 * one.client_s / one.num_tokens),
        client_share=_median(group, lambda one: one.client_s / one.duration_s),
        net_front_us=net_us,
        ttft_p50_ms=_median(group, lambda one: one.ttft_p50_ms),
        itl_p50_ms=_known(group, lambda one: one.itl_p50_ms),
        itl_p99_ms=_known(group, lambda one: one.itl_p99_ms),
        added_ttft_ms=_known(group, lambda one: one.added_ttft_ms),
        added_itl_p50_ms=_known(group, lambda one: one.added_itl_p50_ms),
        added_itl_p99_ms=_known(group, lambda one: one.added_itl_p99_ms),
        longest_lag_ms=max((one.longest_lag_ms or 0.0 for one in group), default=0.0)
        if point.num_long
        else None,
    )


def ratios_of(measured: Sequence[Measured]) -> list[Ratio]:
    """Masters to the relay and to vLLM by what the front takes per token, and the server with the
    built-in model to vLLM by what all processes take. For `requests`, per request."""
    ratios: list[Ratio] = []
    for arm in MASTERS:
        ratios += _ratios(measured, arm, "relay", ("relay",), "front", _front_us, same_mode=True)
        ratios += _ratios(measured, arm, "vllm", VLLM, "front", _front_us, same_mode=False)
    ratios += _ratios(measured, "tinfer", "vllm", VLLM, "front", _front_us, same_mode=True)
    ratios += _ratios(measured, "tinfer", "vllm", VLLM, "whole", _whole_us, same_mode=True)
    return ratios


def _ratios(
    measured: Sequence[Measured],
    arm: Kind,
    to: str,
    others: tuple[Kind, ...],
    name: str,
    figure: Figure,
    same_mode: bool,
) -> Iterable[Ratio]:
    for point in dict.fromkeys(one.point for one in measured if one.arm == arm):
        if point.what not in ("tokens", "requests"):
            continue
        found = []
        for mine in (one for one in measured if one.arm == arm and one.point == point):
            theirs = [
                figure(one)
                for one in measured
                if one.arm in others
                and one.repetition == mine.repetition
                and (one.point.what, one.point.streams) == (point.what, point.streams)
                and (one.point.mode == point.mode or not same_mode)
            ]
            if theirs:
                found.append(figure(mine) / min(theirs))
        if found:
            yield Ratio(
                arm=arm,
                to=to,
                figure=name,
                what=point.what,
                mode=point.mode,
                streams=point.streams,
                median=statistics.median(found),
                least=min(found),
                largest=max(found),
            )


def _front_us(one: Measured) -> float:
    return 1e6 * one.front_s / one.num_tokens


def _whole_us(one: Measured) -> float:
    return 1e6 * (one.front_s + one.engines_s) / one.num_tokens


def _median(group: Sequence[Measured], figure: Figure) -> float:
    return statistics.median(figure(one) for one in group)


def _known(group: Sequence[Measured], figure: Callable[[Measured], float | None]) -> float | None:
    values = [value for one in group if (value := figure(one)) is not None]
    return statistics.median(values) if values else None
