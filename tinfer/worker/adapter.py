"""What the worker's loop asks of an engine; vLLM's and the fake one both answer to it.

An engine is driven from one thread. It owns its KV memory, its leases and its pulls, and reports
what became of them as notices, which the loop sends on unchanged.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from tinfer.wire.messages import (
    Aborted,
    LeaseId,
    LeasesEnded,
    LeasesOverdue,
    Output,
    PullDone,
    Ready,
    Refused,
    Source,
    Start,
    WorkerStats,
)

# `Refused` of a request that was taken and then found to be too much.
Notice = PullDone | LeasesEnded | LeasesOverdue | Aborted | Refused


class EngineRefusal(Exception):
    """The engine does not take a request; `client_fault` says whose fault that is."""

    def __init__(self, message: str, client_fault: bool) -> None:
        super().__init__(message)
        self.client_fault = client_fault


class Report(NamedTuple):
    """What steps did that their outputs do not tell.

    `progress`: prompts of which a chunk was computed and that are not done, with the prompt tokens
    that are, cached ones included. `preempted`: requests that lost their blocks and wait for
    `Engine.resume`; their answers go on where they were.
    """

    progress: list[tuple[str, int]]
    preempted: list[str]


class Engine(Protocol):
    """One inference engine with KV blocks that peers can pull."""

    def ready(self) -> Ready:
        """What it is and holds. `start_s` is left for the caller to fill in."""
        ...

    def wake_fd(self) -> int:
        """A descriptor that becomes readable when a pull has ended."""
        ...

    def clear_wake(self) -> None:
        """Reset `wake_fd`."""
        ...

    def start(self, start: Start) -> None:
        """Take a request. Raises `EngineRefusal`; a lease it was to read is then marked done."""
        ...

    def resume(self, request_id: str, source: Source | None) -> None:
        """Let a preempted request go on: by pulling the blocks of `source`, which has its prompt
        and its answer so far, or (None) by computing them again. For a request that is not here or
        does not wait, nothing happens but that the source is marked done."""
        ...

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests; each known one yields an `Aborted` notice. Unknown ids are ignored."""
        ...

    def set_prefill_budget(self, tokens: int | None) -> None:
        """Compute at most so many prompt tokens per step from the next one on, 0 for none; None: as
        many as a step takes. What decodes and what is pulled never waits for it."""
        ...

    def add_peer(self, worker_id: str, generation: int, export: bytes) -> None: ...

    def drop_peer(self, worker_id: str, generation: int) -> None: ...

    def release_lease(self, lease: LeaseId) -> None:
        """End a lease that nobody will read; unknown or ended ones are ignored."""
        ...

    def extend_lease(self, lease: LeaseId, extra_s: float) -> None: ...

    def has_requests(self) -> bool:
        """Whether anything is computed, queued, pulled or held: then `step` must be called."""
        ...

    def step(self) -> list[Output]:
        """One iteration; also moves pulls and leases on, so it is called when nothing computes."""
        ...

    def take_report(self) -> Report:
        """What the steps since the last call did beside their outputs."""
        ...

    def was_idle_step(self) -> bool:
        """Whether the last step computed nothing: the loop may wait before the next."""
        ...

    def take_notices(self) -> list[Notice]: ...

    def stats(self) -> WorkerStats: ...

    def close(self) -> None: ...
