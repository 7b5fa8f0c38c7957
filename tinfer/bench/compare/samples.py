"""One run as arrays: what the statistics of a comparison are computed from. Pure.

*Resource time* is the paper's: the sum over devices of the time from the start of the run (its
first sending) to the end of the last work on that device. On a device of a replica, work ends with
its last answer; on a device of the `paper` arm with the last answer of all; on a tinfer worker with
the last prefill (the client's first token) or the last decode (its last token) there, as the
answers' traces say. *Busy time* is the sum over devices of the time in which at least one request
was on it: from its sending on a replica, from when its prefill or decode begins on a tinfer worker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from tinfer.bench.compare.limits import LEVELS, Slos
from tinfer.bench.outcome import LoadRun, Outcome

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Interval = tuple[float, float]


class Sample(Struct, frozen=True, kw_only=True):
    """One run of one arm; arrays by request, in the order of the plan.

    `latency_s` has `ttft`, `tpot` and `e2el`, NaN where there is none. `itl_s` are all gaps of the
    run, `itl_owner` the request of each. `good` is by SLO level.
    """

    duration_s: float
    ok: Bools
    good: Mapping[str, Bools]
    latency_s: Mapping[str, Floats]
    itl_s: Floats
    itl_owner: Ints
    output_tokens: Floats
    resource_s: float
    busy_s: float
    server_cpu_s: float

    @property
    def num_requests(self) -> int:
        return len(self.ok)


def sample_of(
    run: LoadRun,
    tasks: Mapping[str, str],
    slos: Slos,
    work: Sequence[Sequence[Interval]],
    server_cpu_s: float,
) -> Sample:
    """The arrays of a whole run; `tasks` says the class of each request id.

    `work` are the intervals of work on each device, from `work_of`.
    """
    outcomes = run.outcomes
    start_s = min((one.sent_s for one in outcomes), default=0.0)
    gaps = [one.itls_s if one.ok else [] for one in outcomes]
    return Sample(
        duration_s=run.duration_s,
        ok=np.array([one.ok for one in outcomes], dtype=np.bool_),
        good={
            level: np.array(
                [slos[level][tasks[one.request_id]].met_by(one) for one in outcomes], np.bool_
            )
            for level in LEVELS
        },
        latency_s={
            "ttft": _floats(one.ttft_s if one.ok else None for one in outcomes),
            "tpot": _floats(one.tpot_s if one.ok else None for one in outcomes),
            "e2el": _floats(one.e2el_s if one.ok else None for one in outcomes),
        },
        itl_s=np.array([gap for each in gaps for gap in each], dtype=np.float64),
        itl_owner=np.repeat(np.arange(len(gaps)), [len(each) for each in gaps]),
        output_tokens=_floats(float(one.output_tokens) if one.ok else 0.0 for one in outcomes),
        resource_s=sum(max(end for _, end in one) - start_s for one in work if one),
        busy_s=sum(covered_s(one) for one in work),
        server_cpu_s=server_cpu_s,
    )


def work_of(
    outcomes: Sequence[Outcome], placed: Mapping[str, int], devices: Sequence[Sequence[int]]
) -> list[list[Interval]]:
    """When each device had work, from what the client saw.

    `placed` is the server of each request, `devices` those of each server. Answers with a trace say
    themselves which workers had them; a worker is a device of its own. What has no trace (a failed
    request of tinfer's) counts on all devices of its server: nobody knows which of them it was on.
    """
    by_device: defaultdict[int | str, list[Interval]] = defaultdict(list)
    untraced = []
    for one in outcomes:
        traced = _traced(one)
        for worker, interval in traced:
            by_device[worker].append(interval)
        untraced += [] if traced or one.request_id not in placed else [one]
    workers = sorted(map(str, by_device))
    for one in untraced:
        last_s = one.chunk_s[-1] if one.chunk_s else one.end_s
        for device in devices[placed[one.request_id]]:
            name = workers[device] if device < len(workers) else device
            by_device[name].append((one.sent_s, last_s))
    return list(by_device.values())


def covered_s(intervals: Sequence[Interval]) -> float:
    """The length of their union."""
    total_s = 0.0
    reached_s = -float("inf")
    for start_s, end_s in sorted(intervals):
        total_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    return total_s


def _traced(one: Outcome) -> list[tuple[str, Interval]]:
    """A trace has durations only; they hang on when the client had the first and last token."""
    trace = one.trace or {}
    prefill, decode = trace.get("prefill_worker"), trace.get("decode_worker")
    if not prefill or not one.chunk_s:
        return []
    first_s, last_s = one.chunk_s[0], one.chunk_s[-1]
    begun_s = max(one.sent_s, first_s - (trace.get("prefill_s") or 0.0))
    if decode is None or decode == prefill:
        return [(prefill, (begun_s, last_s))]
    return [(prefill, (begun_s, first_s)), (decode, (first_s, last_s))]


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array(
        [np.nan if value is None else value for value in values],
        dtype=np.float64,
    )
