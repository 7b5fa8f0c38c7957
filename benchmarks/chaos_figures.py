"""From storms to figures: deaths by phase and kind, what clients noticed of them, and for how long.

`kills`: SIGKILLs and hangs; `faults`: by kind, and by the phase of the request that was aimed at as
the signal was sent; `aims_missed`: phases in which no request came to be in time; `verdicts`: on
every answer, and on what had come of those whose clients left (right; failed; tokens lost, repeated
or changed; text; usage); `refused_without_a_worker`: 503s before anything was accepted;
`streams_hit`: requests whose worker died, by how they went on (*exact* and *fast*: see
tinfer/master/attempts.py; *held*: from blocks that were still held; *from the start*: nothing had
been emitted); `detection`: from the signal to the master's counting the worker as dead;
`worker_away`: from there to its ready successor, back-off included; `problems`: empty if all was
answered rightly, every account was closed, descriptors and processes were as before.

A client's *stall* is the time between the last piece that it read of what it had when the worker
died and the first piece beyond that, taken from streams that were read as they came. For a request
without a token it is the time from the fault to its first token.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.chaos_clients import Asked
from benchmarks.chaos_faults import Fault
from benchmarks.chaos_follow import Death, Loss
from benchmarks.chaos_storm import Storm

# Upper ends of the buckets of tokens that a client had when its worker died.
BUCKETS = (0, 8, 32, 128, 512)


def bucket_name(num_tokens: int) -> str:
    """Such as "9-32"."""
    at = bisect.bisect_left(BUCKETS, num_tokens)
    if at == len(BUCKETS):
        return f"over {BUCKETS[-1]}"
    first = 0 if at == 0 else BUCKETS[at - 1] + 1
    return str(first) if first == BUCKETS[at] else f"{first}-{BUCKETS[at]}"


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Number, p50, p95 and the largest, in seconds."""
    if not values:
        return {"num": 0}
    p50, p95 = np.percentile(values, (50, 95))
    return {
        "num": len(values),
        "p50_s": round(float(p50), 4),
        "p95_s": round(float(p95), 4),
        "max_s": round(max(values), 4),
    }


def stall_s(asked: Asked, num_tokens: int, struck_s: float) -> float | None:
    """The stall of one stream whose client had so many tokens; None where it cannot be told."""
    if asked.is_slow or not asked.body["stream"] or len(asked.choices) > 1:
        return None
    after = next((s for s, num in asked.seen if num > num_tokens), None)
    if after is None:
        return None
    if num_tokens == 0:
        return after - struck_s
    before = [s for s, num in asked.seen if num <= num_tokens]
    return after - before[-1] if before else None


def form_of(loss: Loss, asked: Asked) -> str:
    """How the request went on: what its stall is a matter of."""
    if loss.goes_on == "held":
        return "held"
    return asked.form if loss.num_emitted else "from the start"


def figures_of(storms: Sequence[Storm]) -> dict[str, Any]:
    """The figures of all storms of a run together."""
    faults = [fault for one in storms for fault in one.faults]
    deaths = [death for one in storms for death in one.deaths]
    asked = [request for one in storms for request in one.asked]
    verdicts: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for one in storms:
        verdicts.update(request.verdict for request in one.asked)
        missed.update(one.num_missed)
    return {
        "kills": sum(fault.kind != "pause" for fault in faults),
        "faults": _by_phase(faults),
        "aims_missed": dict(missed),
        "deaths_seen": len(deaths),
        "requests": len(asked),
        "requests_by_kind": dict(Counter(one.kind for one in asked)),
        "tokens": sum(one.num_tokens for one in asked),
        "cancelled": sum(one.cancelled for one in asked),
        "refused_without_a_worker": sum(one.num_refused for one in storms),
        "verdicts": dict(verdicts),
        "failed_streams": verdicts["failed"],
        "wrong_answers": sum(n for name, n in verdicts.items() if name not in ("right", "failed")),
        "streams_hit": _hit(storms),
        "stall": _stalls(storms),
        "detection": _detection(storms),
        "worker_away": spread([d.up_s - d.down_s for d in deaths if d.up_s is not None]),
        "problems": [problem for one in storms for problem in one.problems],
        "seconds": round(sum(one.seconds for one in storms), 1),
    }


def _by_phase(faults: Iterable[Fault]) -> dict[str, dict[str, int]]:
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for fault in faults:
        found[fault.kind][fault.phase] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(found.items())}


def _kinds(storm: Storm) -> dict[Any, Fault]:
    """The fault that each death is due to."""
    return {fault.worker: fault for fault in storm.faults if fault.kind != "pause"}


def _losses(storm: Storm) -> Iterable[tuple[Fault, Death, Loss, Asked | None]]:
    by_id = {one.request_id: one for one in storm.asked if one.request_id is not None}
    faults = _kinds(storm)
    for death in storm.deaths:
        fault = faults.get(death.worker)
        if fault is not None:
            for loss in death.losses:
                yield fault, death, loss, by_id.get(loss.request_id)


def _hit(storms: Sequence[Storm]) -> dict[str, int]:
    """Requests whose worker died, by how they went on; a request counts once per death. Which form
    is known of those that were answered: a client that has left tells nothing any more."""
    counts: Counter[str] = Counter()
    for storm in storms:
        for _, _, loss, asked in _losses(storm):
            if asked is None:
                counts["left by their clients"] += 1
            else:
                counts[form_of(loss, asked)] += 1
    return dict(counts)


def _stalls(storms: Sequence[Storm]) -> list[dict[str, Any]]:
    """A row per kind of fault, form and number of tokens that the client had."""
    cells: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for storm in storms:
        for fault, _, loss, asked in _losses(storm):
            if asked is None or asked.cancelled:
                continue
            stall = stall_s(asked, loss.num_emitted, fault.at_s)
            if stall is not None:
                key = (fault.kind, form_of(loss, asked), bucket_name(loss.num_emitted))
                cells[key].append(stall)
    names = [bucket_name(n) for n in (*BUCKETS, BUCKETS[-1] + 1)]
    order = {name: at for at, name in enumerate(names)}
    rows = sorted(cells.items(), key=lambda item: (*item[0][:2], order[item[0][2]]))
    return [
        {"fault": kind, "form": form, "tokens": tokens, **spread(values)}
        for (kind, form, tokens), values in rows
    ]


def _detection(storms: Sequence[Storm]) -> dict[str, dict[str, float | int]]:
    """From the signal until the master counted the worker as dead."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for storm in storms:
        faults = _kinds(storm)
        for death in storm.deaths:
            if death.worker in faults:
                fault = faults[death.worker]
                found[fault.kind].append(death.down_s - fault.at_s)
    return {kind: spread(values) for kind, values in sorted(found.items())}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The stalls as text."""
    lines = [
        f"{'fault':<7}{'form':<16}{'tokens':<10}{'num':>6}{'p50 s':>9}{'p95 s':>9}{'max s':>9}"
    ]
    for row in rows:
        figures = "".join(f"{row[name]:9.3f}" for name in ("p50_s", "p95_s", "max_s"))
        lines.append(
            f"{row['fault']:<7}{row['form']:<16}{row['tokens']:<10}{row['num']:>6}{figures}"
        )
    return "\n".join(lines)
