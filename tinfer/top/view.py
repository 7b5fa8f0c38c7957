"""What `tinfer top` shows, and the object that its `--json` writes: docs/top.md explains each key.

"In the interval" is between two scrapes; figures of it are None where there is only one, or where
nothing happened that they could be taken of. Figures "so far" count from the start of the server.
"""

from __future__ import annotations

from msgspec import Struct


class Timing(Struct, frozen=True, kw_only=True):
    """Times of the interval, in seconds; `num` of them."""

    num: int
    mean_s: float | None
    p50_s: float | None
    p99_s: float | None


class Requests(Struct, frozen=True, kw_only=True):
    """Per second in the interval, and so far; `refused` and `failed` are by reason."""

    accepted_per_s: float | None
    answered_per_s: float | None
    num_accepted: int
    num_answered: int
    num_aborted: int
    num_refused: int
    num_failed: int
    refused: dict[str, int]
    failed: dict[str, int]


class WorkerView(Struct, frozen=True, kw_only=True):
    """One worker. `busy_share` is of the interval; `num_preemptions`, `num_deaths` and
    `num_restarts` are so far; `kv_bytes` and what is taken of it are None while it is down."""

    id: str
    role: str
    state: str
    reason: str
    generation: int
    device: str
    num_running: int
    num_waiting: int
    kv_bytes: int | None
    kv_used_bytes: int | None
    kv_share: float | None
    outstanding_prefill_tokens: int | None
    busy_share: float | None
    num_preemptions: int
    num_deaths: int
    num_restarts: int


class Waiting(Struct, frozen=True, kw_only=True):
    """A request that waits, and why; as `/debug/state` tells it."""

    request_id: str
    phase: str
    waited_s: float
    prompt_tokens: int
    expected_output_tokens: float
    reason: str


class Handoffs(Struct, frozen=True, kw_only=True):
    """Of the interval; `num_recomputed` are those whose copy failed, so far. As they are now:
    open `leases` by state, `num_pulls` copies under way, and `num_zombies` requests that are over
    for their client and not yet for a worker."""

    per_s: float | None
    bytes_per_s: float | None
    mean_copy_s: float | None
    num_recomputed: int
    leases: dict[str, int]
    num_pulls: int
    num_zombies: int


class Lengths(Struct, frozen=True, kw_only=True):
    """How right the predicted lengths of `num` answers were: the share that lay within the
    predicted interval of 80 %, and the mean distance from the predicted median, in tokens."""

    num: int
    within_share: float | None
    mean_error_tokens: float | None


class View(Struct, frozen=True, kw_only=True):
    """A server at one moment, `unix_s`; `interval_s` is the time since the scrape before."""

    url: str
    model: str
    version: str
    unix_s: float
    interval_s: float | None
    uptime_s: float | None
    was_restarted: bool
    is_healthy: bool
    status: str
    requests: Requests
    output_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    ttft: Timing
    itl: Timing
    e2el: Timing
    loop_lag: Timing
    workers: list[WorkerView]
    requests_by_phase: dict[str, int]
    num_waiting: int
    waiting: list[Waiting]
    handoffs: Handoffs
    lengths: Lengths
    lengths_so_far: Lengths


class Sight(Struct, frozen=True, kw_only=True):
    """What a live view has to show: the last `view`, None before the first, and in `trouble` why
    there is no newer one; `lost_s` is how long ago the server was last seen."""

    url: str
    view: View | None
    trouble: str = ""
    lost_s: float | None = None
