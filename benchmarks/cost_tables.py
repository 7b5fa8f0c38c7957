"""Tables of docs/performance.md from results of `tinfer bench frontend` and `bench handoff`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Found = Mapping[str, Any]


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> Iterator[str]:
    yield row(*cells)
    yield "|" + "---|" * len(cells)


def per_token(rows: list[Found], mode: str) -> Iterator[str]:
    """Processor time per delivered token, by number of streams."""
    yield from head(
        *("streams", "arm", "tokens/s", "front µs", "net of requests", "engines µs", "whole µs"),
        *("events per token", "client's share of a core"),
    )
    mine = [one for one in rows if (one["what"], one["mode"]) == ("tokens", mode)]
    for one in sorted(mine, key=lambda one: (one["streams"], one["arm"])):
        net = one["net_front_us"]
        yield row(
            *(f"{one['streams']:,}", one["arm"], f"{one['tokens_per_s']:,.0f}"),
            *(f"{one['front_us']:.1f}", "–" if net is None else f"{net:.1f}"),
            *(f"{one['engines_us']:.1f}", f"{one['whole_us']:.1f}"),
            *(f"{one['events_per_token']:.2f}", f"{one['client_share']:.0%}"),
        )


def per_request(rows: list[Found]) -> Iterator[str]:
    """Processor time of a request of one token."""
    yield from head("arm", "requests/s", "front µs", "engines µs", "whole µs")
    for one in sorted((one for one in rows if one["what"] == "requests"), key=_by_arm):
        costs = (f"{one[name]:.0f}" for name in ("front_us", "engines_us", "whole_us"))
        yield row(one["arm"], f"{one['requests_per_s']:,.0f}", *costs)


def added(rows: list[Found]) -> Iterator[str]:
    """What one stream gets beyond its engine stand-in's own steps."""
    yield from head("arm", "TTFT + ms", "ITL p50 + ms", "ITL p99 + ms")
    for one in sorted((one for one in rows if one["what"] == "unloaded"), key=_by_arm):
        names = ("added_ttft_ms", "added_itl_p50_ms", "added_itl_p99_ms")
        yield row(one["arm"], *(f"{one[name]:.2f}" for name in names))


def stalls(rows: list[Found]) -> Iterator[str]:
    """What streams feel of long prompts."""
    yield from head("arm", "streams", "tokens/s", "ITL p99 ms", "no turn of the loop later, ms")
    for one in sorted((one for one in rows if one["what"] == "prompts"), key=_by_arm):
        yield row(
            *(one["arm"], str(one["streams"]), f"{one['tokens_per_s']:,.0f}"),
            *(f"{one['itl_p99_ms']:.1f}", f"{one['longest_lag_ms']:g}"),
        )


def cost_ratios(ratios: list[Found]) -> Iterator[str]:
    """With the least and the largest over the repetitions."""
    yield from head("arm", "to", "processor time of", "per", "mode", "streams", "ratio")
    for one in ratios:
        of = {"tokens": "token", "requests": "request"}[one["what"]]
        text = f"{one['median']:.2f} [{one['least']:.2f}, {one['largest']:.2f}]"
        shown = (one["arm"], one["to"], one["figure"], of, one["mode"], f"{one['streams']:,}")
        yield row(*shown, text)


def handoffs(rows: list[Found]) -> Iterator[str]:
    """Speeds of copies, and ours beside memcpy."""
    yield from head(
        *("transport", "layout", "page", "hand-off", "pieces", "copy ms", "plan ms", "ours GB/s"),
        *("same pieces GB/s", "one piece GB/s", "ours / pieces", "ours / one"),
    )
    for one in rows:
        speeds = (one["gb_s"].get(name) for name in ("ours", "pieces", "one"))
        ratios = (one["ratio_to"].get(name) for name in ("pieces", "one"))
        yield row(
            *(one["transport"], one["layout"], f"{one['page_kib']} KiB"),
            *(f"{one['size_kib'] / 1024:g} MiB", f"{one['num_ranges']:,}"),
            *(f"{1e3 * one['seconds']['ours']:.2f}", f"{1e3 * one['plan_s']:.2f}"),
            *("–" if speed is None else f"{speed:.1f}" for speed in speeds),
            *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )


def cost_tables(result: Found) -> dict[str, list[str]]:
    """Each table's lines, by name; none for a result of another kind."""
    if result.get("kind") == "tinfer bench handoff":
        return {"handoffs": list(handoffs(result["rows"]))}
    if result.get("kind") != "tinfer bench frontend":
        return {}
    rows = result["rows"]
    return {
        "paced": list(per_token(rows, "paced")),
        "full": list(per_token(rows, "full")),
        "requests": list(per_request(rows)),
        "added": list(added(rows)),
        "stalls": list(stalls(rows)),
        "costs": list(cost_ratios(result["ratios"])),
    }


def _by_arm(one: Found) -> str:
    return str(one["arm"])
