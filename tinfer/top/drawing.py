"""A view as lines for a terminal of any width; of a narrow one it leaves out what matters least.

Words of the server are shown as plain text: neither as markup nor as what a terminal would obey.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import (
    Console,
    ConsoleOptions,
    JustifyMethod,
    OverflowMethod,
    RenderableType,
    RenderResult,
)
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinfer.top import words
from tinfer.top.view import Handoffs, Lengths, Requests, Sight, Timing, View, Waiting, WorkerView

LABEL_WIDTH = 9
GAP = 2
# What is kept for a column whose text wraps.
WRAPPED_WIDTH = 20
BAR_WIDTH = 8
# Far wider than any terminal: as wide as a table would be if it could.
_ENDLESS = 10_000
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PHASES = {"handoff": "hand-off"}
_STATE_STYLES = {
    "ready": "green",
    "starting": "yellow",
    "restarting": "yellow",
    "draining": "yellow",
}


class Column(NamedTuple):
    """One column of a table; of those that do not fit, the one of the highest rank goes first. One
    that `wraps` stands behind the others, and is never left out."""

    head: str
    rank: int
    is_number: bool = True
    wraps: bool = False

    @property
    def overflow(self) -> OverflowMethod:
        return "fold" if self.wraps else "ellipsis"


TIMINGS = (
    Column("", 0, False),
    Column("num", 2),
    Column("mean", 1),
    Column("p50", 0),
    Column("p99", 0),
)
WORKERS = (
    Column("worker", 0, False),
    Column("role", 6, False),
    Column("state", 0, False),
    Column("run", 1),
    Column("wait", 2),
    Column("KV", 0),
    Column("", 4, False),
    Column("prefill", 3),
    Column("busy", 1),
    Column("deaths", 5),
    Column("gen", 7),
    Column("preempted", 8),
    Column("device", 9, False),
)
WAITING = (
    Column("waiting", 0, False),
    Column("phase", 2, False),
    Column("waited", 1),
    Column("prompt", 3),
    Column("expected", 4),
    Column("reason", 0, is_number=False, wraps=True),
)


class Picture:
    """What is seen of a server, for `Console.print`; `hint` says how to leave."""

    def __init__(self, sight: Sight, hint: str = "") -> None:
        self._sight = sight
        self._hint = hint

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sight, view = self._sight, self._sight.view
        yield _head(sight, self._hint, options.max_width)
        if sight.trouble:
            yield Text(_clean(_trouble(sight)), style="bold red")
        if view is None:
            return
        yield _figures(view, options.max_width)
        yield Text()
        times = (("TTFT", view.ttft), ("ITL", view.itl), ("E2EL", view.e2el))
        rows = [_timing(name, timing) for name, timing in (*times, ("loop lag", view.loop_lag))]
        yield _table(TIMINGS, rows, console, options)
        yield Text()
        rows = [_worker(worker) for worker in view.workers]
        yield _table(WORKERS, rows, console, options)
        yield from _reasons(view.workers)
        yield Text()
        yield from _waiting(view, console, options)


# --- the head ------------------------------------------------------------------------------------


def _head(sight: Sight, hint: str, width: int) -> Text:
    view = sight.view
    pieces = [Text(_clean(sight.url))]
    if view is not None:
        pieces = [
            Text(_clean(view.model), style="bold"),
            *pieces,
            Text(f"tinfer {_clean(view.version)}"),
            Text(f"up {words.duration(view.uptime_s)}"),
        ]
    if view is not None and not sight.trouble:
        status = view.status or ("ok" if view.is_healthy else "unhealthy")
        pieces.append(Text(_clean(status), style="green" if view.is_healthy else "bold red"))
        if view.was_restarted:
            pieces.append(Text("restarted", style="yellow"))
    if hint:
        pieces.append(Text(hint, style="dim"))
    return _flow(pieces, width)


def _trouble(sight: Sight) -> str:
    seen = "" if sight.lost_s is None else f"; last seen {words.seconds(sight.lost_s)} ago"
    return f"{sight.trouble}{seen}; trying on"


def _figures(view: View, width: int) -> Table:
    """Lines of a label and figures, which flow."""
    in_flight = [
        f"{words.count(num)} {_PHASES.get(phase, _clean(phase))}"
        for phase, num in view.requests_by_phase.items()
    ]
    lines: tuple[tuple[str, list[str]], ...] = (
        ("requests", _rates(view.requests)),
        ("so far", _totals(view.requests)),
        (
            "tokens",
            [
                f"{words.rate(view.output_tokens_per_s)} output",
                f"{words.rate(view.prompt_tokens_per_s)} prompt",
            ],
        ),
        ("in flight", in_flight),
        ("hand-offs", _handoffs(view.handoffs)),
        ("lengths", _lengths(view.lengths, view.lengths_so_far)),
    )
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(width=LABEL_WIDTH)
    table.add_column()
    for label, pieces in lines:
        flowing = _flow([Text(piece) for piece in pieces], width - LABEL_WIDTH - GAP)
        table.add_row(Text(label, style="dim"), flowing)
    return table


def _rates(requests: Requests) -> list[str]:
    return [
        f"{words.rate(requests.accepted_per_s)} in",
        f"{words.rate(requests.answered_per_s)} answered",
    ]


def _totals(requests: Requests) -> list[str]:
    return [
        f"{words.count(requests.num_accepted)} accepted",
        f"{words.count(requests.num_answered)} answered",
        f"{words.count(requests.num_aborted)} aborted",
        f"{words.count(requests.num_refused)} refused{_why(requests.refused)}",
        f"{words.count(requests.num_failed)} failed{_why(requests.failed)}",
    ]


def _why(reasons: dict[str, int]) -> str:
    told = [f"{_clean(reason)} {words.count(num)}" for reason, num in reasons.items() if num]
    return f" ({', '.join(told)})" if told else ""


def _handoffs(handoffs: Handoffs) -> list[str]:
    leases = [
        f"{words.count(num)} {_clean(state)}" for state, num in handoffs.leases.items() if num
    ]
    return [
        words.rate(handoffs.per_s),
        f"{words.size(handoffs.bytes_per_s)}/s",
        f"copy {words.seconds(handoffs.mean_copy_s)}",
        f"{words.count(handoffs.num_recomputed)} recomputed",
        f"leases {', '.join(leases) or 0}",
        f"pulls {words.count(handoffs.num_pulls)}",
        f"zombies {words.count(handoffs.num_zombies)}",
    ]


def _lengths(lengths: Lengths, so_far: Lengths) -> list[str]:
    right = f"{words.share(lengths.within_share)} of {words.count(lengths.num)}"
    return [
        f"{right} in the predicted interval",
        f"error {words.tokens(lengths.mean_error_tokens)}",
        f"so far {words.share(so_far.within_share)} of {words.count(so_far.num)},"
        f" {words.tokens(so_far.mean_error_tokens)}",
    ]


# --- tables --------------------------------------------------------------------------------------


def _timing(name: str, timing: Timing) -> list[RenderableType]:
    shown = (timing.mean_s, timing.p50_s, timing.p99_s)
    return [Text(name), Text(words.count(timing.num)), *(Text(words.seconds(one)) for one in shown)]


def _worker(worker: WorkerView) -> list[RenderableType]:
    outstanding = worker.outstanding_prefill_tokens
    share = worker.kv_share or 0.0
    return [
        Text(_clean(worker.id), style="bold"),
        Text(_clean(worker.role)),
        Text(_clean(worker.state), style=_STATE_STYLES.get(worker.state, "bold red")),
        Text(words.count(worker.num_running)),
        Text(words.count(worker.num_waiting)),
        Text(words.share(worker.kv_share)),
        ProgressBar(total=1.0, completed=share, width=BAR_WIDTH, complete_style=_bar_style(share)),
        Text(words.NOTHING if outstanding is None else words.count(outstanding)),
        Text(words.share(worker.busy_share)),
        Text(words.count(worker.num_deaths), style="red" if worker.num_deaths else ""),
        Text(str(worker.generation)),
        Text(words.count(worker.num_preemptions)),
        Text(_clean(worker.device)),
    ]


def _bar_style(share: float) -> str:
    return "green" if share < 0.7 else "yellow" if share < 0.9 else "red"


def _reasons(workers: Iterable[WorkerView]) -> Iterator[Text]:
    """Why a worker is not up, where it has been said."""
    for worker in workers:
        if worker.reason:
            yield Text(f"{_clean(worker.id)}: {_clean(worker.reason)}", style="red")


def _waiting(view: View, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
    if not view.num_waiting:
        yield Text("no request waits", style="dim")
        return
    rows = [_wait(one) for one in view.waiting]
    if rows:
        yield _table(WAITING, rows, console, options)
    more = view.num_waiting - len(rows)
    if more:
        told = f"and {words.count(more)} more" if rows else f"waiting: {words.count(more)}"
        yield Text(told, style="dim")


def _wait(waiting: Waiting) -> list[RenderableType]:
    return [
        Text(_clean(waiting.request_id)),
        Text(_clean(waiting.phase)),
        Text(words.seconds(waiting.waited_s)),
        Text(words.count(waiting.prompt_tokens)),
        Text(words.count(waiting.expected_output_tokens)),
        Text(_clean(waiting.reason)),
    ]


def _table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[RenderableType]],
    console: Console,
    options: ConsoleOptions,
) -> Table:
    """As many of the columns as fit beside each other, two at least."""
    fixed = [index for index, column in enumerate(columns) if not column.wraps]
    wrapping = [index for index, column in enumerate(columns) if column.wraps]
    width = options.max_width - (GAP + WRAPPED_WIDTH) * len(wrapping)
    endless = options.update(width=_ENDLESS)
    while len(fixed) > 2:
        table = _table_of(columns, rows, fixed)
        if Measurement.get(console, endless, table).maximum <= width:
            break
        fixed.remove(max(fixed, key=lambda index: columns[index].rank))
    return _table_of(columns, rows, [*fixed, *wrapping])


def _table_of(
    columns: Sequence[Column], rows: Sequence[Sequence[RenderableType]], kept: Sequence[int]
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for column in (columns[index] for index in kept):
        justify: JustifyMethod = "right" if column.is_number else "left"
        table.add_column(
            column.head, justify=justify, no_wrap=not column.wraps, overflow=column.overflow
        )
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    return table


# --- text ----------------------------------------------------------------------------------------


def _flow(pieces: Iterable[Text], width: int) -> Text:
    """The pieces behind each other, on a new line where the next one does not fit any more."""
    flowing, used = Text(), 0
    for piece in pieces:
        if used and used + GAP + piece.cell_len > width:
            flowing.append("\n")
            used = 0
        elif used:
            flowing.append(" " * GAP)
            used += GAP
        flowing.append_text(piece)
        used += piece.cell_len
    return flowing


def _clean(text: str) -> str:
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
