"""What a run gave, per request and as figures; names and definitions are `tinfer bench`'s.

All times are as the client sees them: a token is there a message after the step that sampled it.
Failed requests are in no latency; they lower throughput and goodput. What was not measured is NaN.

| key | meaning |
|---|---|
| `{mean,median,p99}_ttft_ms`, `..._tpot_ms`, `..._e2el_ms` | latencies from arrival |
| `p99_itl_ms` | of all gaps between tokens |
| `request_throughput`, `output_throughput` | whole answers, and their tokens, per second |
| `goodput_LEVEL` | share of answers within that SLO of their class x offered rate |
| `resource_s`, `busy_s` | device-seconds, see below |
| `perf_per_dollar_reciprocal` | 1 / (mean E2EL in s x resource time in s) |
| `perf_per_dollar_paper` | only as a ratio: (1 + relative cut of mean E2EL) / ratio of resource |
| `num_failed`, `num_preemptions` | requests without a whole answer; times that blocks were lost |
| `num_reprefills` | prompts computed again, with the answer so far, on another engine after that |

*Resource time* is the paper's: the sum over devices of the time from the start of the run to the
end of the last work there. On a tinfer worker that is the last prefill (its first token) or the
last decode (its last token); on an engine that serves whole requests its last answer. *Busy time*
is the sum over devices of the time in which at least one request was on it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from tinfer.sim.jobs import Ticket
from tinfer.sim.world import World

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Interval = tuple[float, float]

PAPER_FORM = "perf_per_dollar_paper"
RECIPROCAL_FORM = "perf_per_dollar_reciprocal"
_MS = 1000.0


class RequestResult(Struct, frozen=True, kw_only=True):
    """One request as its client saw it; `error` says why it has no whole answer.

    `workers` computed it in this order. `started_s` is when it was first sent to one, None where it
    never was; `handoff_s` from prefill done to installed. Times of tokens are None where none came.
    `num_preemptions` has those of what was computed again for it, too.
    """

    request_id: str
    task: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None
    last_token_s: float | None
    started_s: float | None
    handoff_s: float | None
    route: str | None
    workers: tuple[str, ...]
    cached_tokens: int
    num_preemptions: int
    error: str | None

    @property
    def ok(self) -> bool:
        """The whole answer came."""
        return self.error is None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def e2el_s(self) -> float | None:
        return None if self.last_token_s is None else self.last_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first one; None for an answer of one token."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


class WorkerResult(Struct, frozen=True, kw_only=True):
    """One engine over the run. `step_s` is time spent in steps; `work` when requests were on it.
    `num_reprefills` it computed for others, `num_preemptions` happened on it."""

    worker_id: str
    num_devices: int
    num_steps: int
    step_s: float
    num_prefill_tokens: int
    num_preemptions: int
    num_reprefills: int
    work: tuple[Interval, ...]


class SimRun(Struct, frozen=True, kw_only=True):
    """One run. `requests` are in the order of the spec; `itl_s` are all gaps of whole answers, and
    `itl_owner` the place in `requests` of each. `duration_s` ends with the last answer."""

    requests: tuple[RequestResult, ...]
    workers: tuple[WorkerResult, ...]
    itl_s: Floats
    itl_owner: Ints
    duration_s: float

    @property
    def resource_s(self) -> float:
        """Device-seconds to the end of the last work on each device."""
        start_s = min((one.arrival_s for one in self.requests), default=0.0)
        return sum(
            one.num_devices * (max(end_s for _, end_s in one.work) - start_s)
            for one in self.workers
            if one.work
        )

    @property
    def busy_s(self) -> float:
        """Device-seconds with at least one request on the device."""
        return sum(one.num_devices * covered_s(one.work) for one in self.workers)


class Slo(Struct, frozen=True, kw_only=True):
    """Upper bounds; None bounds nothing. An answer of one token has TPOT 0."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    def met_by(self, one: RequestResult) -> bool:
        """Whether the answer came whole and met every bound."""
        if not one.ok:
            return False
        pairs = ((one.ttft_s, self.ttft_s), (one.tpot_s, self.tpot_s), (one.e2el_s, self.e2el_s))
        return all(bound is None or (seen or 0.0) <= bound for seen, bound in pairs)


Slos = Mapping[str, Mapping[str, Slo]]
NO_SLOS: Slos = {}


def figures_of(
    run: SimRun, slos: Slos = NO_SLOS, offered_rps: float | None = None
) -> dict[str, float]:
    """Every figure of the module's table that one run has; `slos` are by level and class.

    `offered_rps` None takes the rate at which the requests came. Where all came at once no rate was
    offered, and goodput is good answers per second of the run.
    """
    whole = [one for one in run.requests if one.ok]
    rate_rps = offered_rps or _arrival_rate_rps(run)
    figures = {
        f"goodput_{level}": _goodput_rps(run, by_task, rate_rps) for level, by_task in slos.items()
    }
    figures["request_throughput"] = _per_s(len(whole), run.duration_s)
    figures["output_throughput"] = _per_s(sum(one.output_tokens for one in whole), run.duration_s)
    for name in ("ttft", "tpot", "e2el"):
        values_ms = _MS * _floats(getattr(one, f"{name}_s") for one in whole)
        values_ms = values_ms[~np.isnan(values_ms)]
        figures[f"mean_{name}_ms"] = float(values_ms.mean()) if len(values_ms) else np.nan
        figures[f"median_{name}_ms"] = _percentile(values_ms, 50.0)
        figures[f"p99_{name}_ms"] = _percentile(values_ms, 99.0)
    figures["p99_itl_ms"] = _percentile(run.itl_s * _MS, 99.0)
    figures["resource_s"] = run.resource_s
    figures["busy_s"] = run.busy_s
    figures[RECIPROCAL_FORM] = _per_s(_MS, figures["mean_e2el_ms"] * run.resource_s)
    figures["num_failed"] = len(run.requests) - len(whole)
    figures["num_preemptions"] = sum(one.num_preemptions for one in run.workers)
    figures["num_reprefills"] = sum(one.num_reprefills for one in run.workers)
    return figures


def ratios_of(figures: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Every figure as a ratio to the baseline's, and the paper's perf/$; NaN where there is none.

    The paper's own five values are of its form, (1 + relative cut of mean E2EL) / ratio of resource
    time; the reciprocal is the usual one.
    """
    ratios = {
        name: value / baseline[name] if baseline.get(name) else np.nan
        for name, value in figures.items()
    }
    ratios[PAPER_FORM] = _per_s(2.0 - ratios["mean_e2el_ms"], ratios["resource_s"])
    return ratios


def result_of(world: World) -> SimRun:
    """The results of a world that has run to its end."""
    step_ends_s = [engine.log.ends_s() for engine in world.engines]
    token_s = [_token_times_s(ticket, step_ends_s, world.message_s) for ticket in world.tickets]
    lost = Counter({one.request.request_id: one.num_preemptions for one in world.tickets})
    for one in world.reprefills:
        lost[one.request.request_id] += one.num_preemptions
    results = tuple(
        _result(one, times_s, lost[one.request.request_id])
        for one, times_s in zip(world.tickets, token_s, strict=True)
    )
    gaps_s = [
        np.diff(times_s) if one.ok else np.empty(0)
        for one, times_s in zip(results, token_s, strict=True)
    ]
    reprefills = [one for one in world.reprefills if one.prefilled_s is not None]
    work = _work_of(results, reprefills)
    num_reprefills = Counter(one.workers[0] for one in reprefills)
    lasts_s = [one.last_token_s for one in results if one.last_token_s is not None]
    return SimRun(
        requests=results,
        workers=tuple(
            WorkerResult(
                worker_id=engine.worker_id,
                num_devices=engine.spec.num_devices,
                num_steps=engine.num_steps,
                step_s=engine.busy_s,
                num_prefill_tokens=engine.num_prefill_tokens,
                num_preemptions=engine.num_preemptions,
                num_reprefills=num_reprefills[engine.worker_id],
                work=tuple(work[engine.worker_id]),
            )
            for engine in world.engines
        ),
        itl_s=np.concatenate([np.empty(0), *gaps_s]),
        itl_owner=np.repeat(np.arange(len(gaps_s)), [len(each) for each in gaps_s]),
        duration_s=max(lasts_s, default=0.0),
    )


def covered_s(intervals: Iterable[Interval]) -> float:
    """The length of their union."""
    total_s, reached_s = 0.0, -float("inf")
    for start_s, end_s in sorted(intervals):
        total_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    return total_s


def _token_times_s(ticket: Ticket, step_ends_s: Sequence[Floats], message_s: float) -> Floats:
    """When the client had each token."""
    rows: list[Any] = []
    for piece in ticket.pieces:
        if isinstance(piece, float):
            rows.append((piece,))
        else:
            place, first, behind = piece
            rows.append(step_ends_s[place][first:behind])
    return np.concatenate(rows) + message_s if rows else np.empty(0)


def _result(ticket: Ticket, token_s: Floats, num_preemptions: int) -> RequestResult:
    request = ticket.request
    handoff_s = None
    if ticket.pulled_s is not None and ticket.prefilled_s is not None:
        handoff_s = ticket.pulled_s - ticket.prefilled_s
    return RequestResult(
        request_id=request.request_id,
        task=request.task,
        arrival_s=request.arrival_s,
        prompt_tokens=request.prompt_tokens,
        output_tokens=len(token_s),
        first_token_s=float(token_s[0]) if len(token_s) else None,
        last_token_s=ticket.last_token_s,
        started_s=ticket.started_s,
        handoff_s=handoff_s,
        route=ticket.route,
        workers=tuple(ticket.workers),
        cached_tokens=ticket.cached_tokens,
        num_preemptions=num_preemptions,
        error=ticket.error,
    )


def _work_of(
    results: Iterable[RequestResult], reprefills: Iterable[Ticket]
) -> defaultdict[str, list[Interval]]:
    """When each worker had work: a split prompt from its sending to its first token, its decode
    from there on; a whole request from its sending to its last token; what was computed again, from
    its sending to its end."""
    work: defaultdict[str, list[Interval]] = defaultdict(list)
    for again in reprefills:
        assert again.started_s is not None and again.prefilled_s is not None
        work[again.workers[0]].append((again.started_s, again.prefilled_s))
    for one in results:
        if one.first_token_s is None or one.last_token_s is None or one.started_s is None:
            continue
        first, *others = one.workers
        if not others:
            work[first].append((one.started_s, one.last_token_s))
        else:
            work[first].append((one.started_s, one.first_token_s))
            work[others[-1]].append((one.first_token_s, one.last_token_s))
    return work


def _arrival_rate_rps(run: SimRun) -> float | None:
    last_s = max((one.arrival_s for one in run.requests), default=0.0)
    return len(run.requests) / last_s if last_s > 0.0 else None


def _goodput_rps(run: SimRun, by_task: Mapping[str, Slo], rate_rps: float | None) -> float:
    num_good = sum(by_task[one.task].met_by(one) for one in run.requests)
    if rate_rps is None:
        return _per_s(num_good, run.duration_s)
    return _per_s(num_good * rate_rps, len(run.requests))


def _per_s(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0.0 else np.nan


def _percentile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else np.nan


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
