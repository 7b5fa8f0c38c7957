"""The service levels of a comparison, per request class, from what each class takes unloaded.

Fixed before anything was measured: TTFT within 5 times and TPOT within 4 times (*loose*) or 2 times
(*tight*) the median of that class's unloaded time on one plain replica, measured one request after
the other in the same run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from msgspec import Struct

from tinfer.bench.outcome import Outcome
from tinfer.bench.slo import Slo

TTFT_FACTOR = 5.0
TPOT_FACTORS = {"loose": 4.0, "tight": 2.0}
LEVELS = tuple(TPOT_FACTORS)

Slos = Mapping[str, Mapping[str, Slo]]


class Unloaded(Struct, frozen=True, kw_only=True):
    """Medians of one class alone on a replica; `tpot_s` None where no answer had two tokens.

    `longest_e2el_s` is the slowest of its requests.
    """

    num_requests: int
    ttft_s: float
    tpot_s: float | None
    mean_e2el_s: float
    longest_e2el_s: float


def unloaded_of(tasks: Mapping[str, str], outcomes: Sequence[Outcome]) -> dict[str, Unloaded]:
    """By class, from sequential requests; `tasks` says the class of each request id.

    Classes without a whole answer are left out.
    """
    by_task: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.ok:
            by_task[tasks[outcome.request_id]].append(outcome)
    found = {}
    for task, whole in sorted(by_task.items()):
        tpots_s = [one.tpot_s for one in whole if one.tpot_s is not None]
        found[task] = Unloaded(
            num_requests=len(whole),
            ttft_s=median(one.ttft_s for one in whole),
            tpot_s=median(tpots_s) if tpots_s else None,
            mean_e2el_s=sum(one.e2el_s for one in whole) / len(whole),
            longest_e2el_s=max(one.e2el_s for one in whole),
        )
    return found


def slos_of(unloaded: Mapping[str, Unloaded]) -> dict[str, dict[str, Slo]]:
    """The bounds of each class at each level."""
    return {
        level: {
            task: Slo(
                ttft=1000.0 * TTFT_FACTOR * one.ttft_s,
                tpot=None if one.tpot_s is None else 1000.0 * factor * one.tpot_s,
            )
            for task, one in unloaded.items()
        }
        for level, factor in TPOT_FACTORS.items()
    }
