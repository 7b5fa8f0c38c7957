"""The one table of legal phase changes; every change of a request's phase goes through `move`."""

from __future__ import annotations

from typing import Protocol

from tinfer.core.types import Phase

# QUEUED as a target is a restart elsewhere, for what its worker lost.
LEGAL: dict[Phase, set[Phase]] = {
    Phase.QUEUED: {Phase.PREFILLING, Phase.FINISHED},
    Phase.PREFILLING: {Phase.HANDOFF, Phase.DECODING, Phase.FINISHED, Phase.QUEUED},
    Phase.HANDOFF: {Phase.DECODING, Phase.QUEUED, Phase.FINISHED},
    Phase.DECODING: {Phase.FINISHED, Phase.QUEUED},
    Phase.FINISHED: set(),
}


class LifecycleError(RuntimeError):
    """An invariant of ours is broken: a phase change, a request or a worker that cannot be."""


class HasPhase(Protocol):
    """What `move` needs of a request."""

    id: str
    phase: Phase


def move(request: HasPhase, phase: Phase) -> None:
    """Change the phase. Raises `LifecycleError` where the table does not allow it."""
    if phase not in LEGAL[request.phase]:
        raise LifecycleError(f"{request.id}: {request.phase.value} to {phase.value}")
    request.phase = phase
