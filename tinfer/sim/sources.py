"""Where the requests of a run come from: a workload by its spec, or a request log once more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

from msgspec import Struct
from msgspec.structs import replace

from tinfer.errors import StartError
from tinfer.sim.spec import check_arrival
from tinfer.workloads import (
    WORKLOADS,
    Limits,
    LogRecord,
    Request,
    WorkloadSpec,
    from_log,
    make,
    read_log,
)


class Source(Struct, frozen=True, kw_only=True):
    """Plain data that stands for a list of requests; either `workload` or `log` is set.

    Of a log, `num_requests` None takes all; `rate_rps` None plays it at the speed it had.
    `seed` numbers draws of a workload; a log is the same for all. `rate_rps` infinite: all at once.
    """

    workload: str | None = None
    log: str | None = None
    num_requests: int | None = None
    rate_rps: float | None = None
    seed: int = 0
    burstiness: float | None = None
    length_scale: float = 1.0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    options: dict[str, float] = {}

    @property
    def name(self) -> str:
        """For a reader."""
        return self.workload or os.path.basename(self.log or "")


def requests_of(source: Source) -> list[Request]:
    """The requests. Raises `StartError` for what there is not, or what makes no sense."""
    try:
        requests = make(_spec(source)) if source.log is None else _from_log(source)
        for one in requests:
            check_arrival(one.request_id, one.arrival_s)
        return requests
    except ValueError as error:
        raise StartError(f"{source.name}: {error}") from error
    except OSError as error:
        raise StartError(f"cannot read {source.log}: {error.strerror}") from error


def at_rate(source: Source, rate_rps: float) -> Source:
    """The same requests, arriving at this mean rate."""
    return replace(source, rate_rps=rate_rps)


def drawn_anew(source: Source, number: int) -> Source:
    """The `number`-th draw of the same workload; a log stays what it is."""
    return replace(source, seed=source.seed + number)


def _spec(source: Source) -> WorkloadSpec:
    name = source.workload
    if name is None or name not in WORKLOADS:
        raise StartError(f"no workload is called {name}; there are: {', '.join(WORKLOADS)}")
    is_at_once = source.rate_rps == float("inf")
    return WorkloadSpec(
        name=name,
        num_requests=source.num_requests or 1,
        rate_rps=None if is_at_once else source.rate_rps,
        at_once=is_at_once,
        seed=source.seed,
        burstiness=source.burstiness,
        length_scale=source.length_scale,
        max_prompt_tokens=source.max_prompt_tokens,
        max_output_tokens=source.max_output_tokens,
        options=dict(source.options),
    )


def _from_log(source: Source) -> list[Request]:
    limits = Limits(source.length_scale, source.max_prompt_tokens, source.max_output_tokens)
    records = _logged(str(source.log))[: source.num_requests]
    if not records:
        raise ValueError("no request in the log")
    if source.rate_rps is None:
        return from_log(records, limits=limits)
    requests = from_log(records, limits=limits)
    if source.rate_rps == float("inf"):
        return [replace(one, arrival_s=0.0) for one in requests]
    return from_log(records, _speed(requests, source.rate_rps), limits)


def _speed(requests: Sequence[Request], rate_rps: float) -> float:
    """How many times faster the log has to be played for that mean rate."""
    last_s = requests[-1].arrival_s
    if not last_s > 0.0:
        raise ValueError("all requests of the log arrive at once: no rate can be given to them")
    return rate_rps * last_s / len(requests)


@lru_cache(maxsize=4)
def _logged(path: str) -> tuple[LogRecord, ...]:
    """By arrival, so that the first of them are the earliest."""
    return tuple(sorted(read_log(path), key=lambda record: record.arrival_s))
