"""`tinfer drain` and `tinfer restart`: ask a running server, and follow the worker to the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct

from tinfer.client import Client
from tinfer.errors import StartError

POLL_S = 0.1
EXIT_GIVEN_UP = 1


class Roll(Struct, frozen=True, kw_only=True):
    """How it went. `num_requests` were on the worker when it was asked to leave, of which
    `num_moved` went on elsewhere because its time was up or it died; `generation` is the worker's
    incarnation at the end, `state` what it is then (`stopped`, `ready` or `given-up`)."""

    action: Literal["drain", "restart"]
    worker: str
    state: str
    reason: str
    generation: int
    num_requests: int
    num_moved: int
    elapsed_s: float


def roll(
    client: Client,
    action: Literal["drain", "restart"],
    worker_id: str,
    drain_timeout_s: float,
    say: Callable[[str], None],
) -> Roll:
    """Have the worker leave, and come back if it is to be restarted; `say` gets a line whenever
    something has changed. Raises `TinferClientError`, or `StartError` for an unknown worker."""
    started_s = time.monotonic()
    state = client.state()
    first = _worker(state, worker_id)
    (client.drain if action == "drain" else client.restart)(worker_id, drain_timeout_s)
    said = ""
    while True:
        now = client.state()
        worker = _worker(now, worker_id)
        line = _line(worker)
        if line != said:
            say(f"{worker_id}: {line}")
            said = line
        if _is_over(action, first, worker):
            return Roll(
                action=action,
                worker=worker_id,
                state=worker["state"],
                reason=worker["reason"],
                generation=worker["generation"],
                num_requests=_num_requests(first),
                num_moved=now["num_restarts"] - state["num_restarts"],
                elapsed_s=time.monotonic() - started_s,
            )
        time.sleep(POLL_S)


def _is_over(action: str, first: dict[str, Any], worker: dict[str, Any]) -> bool:
    is_new: bool = worker["generation"] > first["generation"]
    match worker["state"]:
        case "given-up":
            return is_new or action == "drain"
        case "stopped":
            return action == "drain"
        case "ready":
            return is_new and action == "restart"
    return False


def _line(worker: dict[str, Any]) -> str:
    if worker["state"] != "draining":
        return str(worker["state"])
    num = _num_requests(worker)
    return f"draining, {num} request{'' if num == 1 else 's'}"


def _num_requests(worker: dict[str, Any]) -> int:
    scheduled = worker["scheduled"]
    return 0 if scheduled is None else int(scheduled["num_seqs"])


def _worker(state: dict[str, Any], worker_id: str) -> dict[str, Any]:
    workers: list[dict[str, Any]] = state["workers"]
    for worker in workers:
        if worker["id"] == worker_id:
            return worker
    known = ", ".join(worker["id"] for worker in workers)
    raise StartError(f"there is no worker {worker_id!r}; there are: {known}")
