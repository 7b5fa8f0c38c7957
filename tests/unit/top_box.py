"""Scrapes of a dispatcher that a test moves, and a view with something in each of its places."""

from __future__ import annotations

from typing import Any

import msgspec

from tests.unit.metrics_box import MeteredBox
from tinfer.api.exposition import exposition
from tinfer.top.scrape import Scrape, scrape_of
from tinfer.top.view import (
    Handoffs,
    Lengths,
    Requests,
    Sight,
    Timing,
    View,
    Waiting,
    WorkerView,
)

URL = "http://127.0.0.1:8000"
WORKER = {"role": "prefill", "state": "ready", "device": "core 0", "generation": 1, "reason": ""}
STATE: dict[str, Any] = {
    "status": "ok",
    "workers": [{**WORKER, "id": "p", "pid": 5}, {**WORKER, "id": "d", "role": "decode"}],
    "waiting": [],
    "requests_by_phase": {"queued": 0, "prefilling": 0, "handoff": 0, "decoding": 0},
}
LEDGER = {"open_requests": 0, "pulls": 0, "zombies": 0}
BOOT_UNIX_S = 1_000_000.0


async def scraped(
    box: MeteredBox,
    at_s: float,
    state: dict[str, Any] = STATE,
    ledger: dict[str, Any] = LEDGER,
    started_s: float | None = None,
) -> Scrape:
    """What the server of the box says at that moment; `started_s` is when its process began."""
    text, _ = await exposition(box.registry, "")
    lines = text.decode().splitlines(keepends=True)
    if started_s is not None:
        name = "process_start_time_seconds "
        lines = [one if not one.startswith(name) else f"{name}{started_s}\n" for one in lines]
    return scrape_of("".join(lines), state, ledger, at_s, BOOT_UNIX_S + at_s)


def timing(num: int = 12, mean_s: float = 0.0134) -> Timing:
    return Timing(num=num, mean_s=mean_s, p50_s=mean_s, p99_s=3 * mean_s)


def worker_view(**changed: Any) -> WorkerView:
    worker = WorkerView(
        id="prefill-0",
        role="prefill",
        state="ready",
        reason="",
        generation=1,
        device="core 0",
        num_running=3,
        num_waiting=1,
        kv_bytes=1000,
        kv_used_bytes=450,
        kv_share=0.45,
        outstanding_prefill_tokens=1536,
        busy_share=0.8,
        num_preemptions=77,
        num_deaths=0,
        num_restarts=0,
    )
    return msgspec.structs.replace(worker, **changed)


def waiting(**changed: Any) -> Waiting:
    one = Waiting(
        request_id="0badcafe-17",
        phase="queued",
        waited_s=1.25,
        prompt_tokens=4321,
        expected_output_tokens=99.6,
        reason="prefill-0 has 1536 prompt tokens to do",
    )
    return msgspec.structs.replace(one, **changed)


def view(**changed: Any) -> View:
    made = View(
        url=URL,
        model="tinfer-tiny",
        version="0.1.0",
        unix_s=BOOT_UNIX_S,
        interval_s=1.0,
        uptime_s=93784.5,
        was_restarted=False,
        is_healthy=True,
        status="ok",
        requests=Requests(
            accepted_per_s=12.0,
            answered_per_s=11.5,
            num_accepted=1234,
            num_answered=1200,
            num_aborted=2,
            num_refused=3,
            num_failed=0,
            refused={"queue-full": 3, "slo": 0},
            failed={"engine": 0},
        ),
        output_tokens_per_s=1234.5,
        prompt_tokens_per_s=4567.8,
        ttft=timing(),
        itl=timing(1200, 0.0017),
        e2el=timing(11, 1.25),
        loop_lag=timing(200, 0.0004),
        workers=[
            worker_view(),
            worker_view(id="decode-0", role="decode", kv_share=1.0, num_deaths=2, generation=3),
        ],
        requests_by_phase={"queued": 34, "prefilling": 1, "handoff": 2, "decoding": 12},
        num_waiting=36,
        waiting=[waiting()],
        handoffs=Handoffs(
            per_s=2.0,
            bytes_per_s=1_230_000.0,
            mean_copy_s=0.0032,
            num_recomputed=1,
            leases={"waiting": 2, "reading": 1, "read": 0},
            num_pulls=1,
            num_zombies=0,
        ),
        lengths=Lengths(num=12, within_share=0.78, mean_error_tokens=14.0),
        lengths_so_far=Lengths(num=1200, within_share=0.81, mean_error_tokens=12.5),
    )
    return msgspec.structs.replace(made, **changed)


def sight(**changed: Any) -> Sight:
    return Sight(url=URL, view=view(**changed))
