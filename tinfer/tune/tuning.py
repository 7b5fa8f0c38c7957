"""One tuning: everything that `tinfer tune` found out for a device and a model, as one JSON object.

The same object is what is stored and what `--json` writes; its keys are the fields of `Tuning` and
of the structs within it, in seconds, tokens and bytes.
"""

from __future__ import annotations

import statistics

from msgspec import Struct

from tinfer.core.costs import CostModel
from tinfer.tune.chunk import Chunk
from tinfer.tune.fit import Fit
from tinfer.tune.identity import Identity
from tinfer.tune.points import HandoffPoint, KvRoom, StepPoint

# Raised whenever a file of before would be misread.
VERSION = 1


class Tuning(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured (`steps`, `handoffs`, `kv`) and what follows from it (`fit`, `chunk`).

    `identity` says for what it holds. `model` is the name or directory as the user gave it,
    `transport` how KV blocks moved, `versions` those of tinfer, Python and the engine's packages,
    `date` when it was measured (UTC, ISO 8601), `repeats` and `seed` as asked for. `loop_s` is what
    a worker spends between two steps on messages; it is part of every sample of a step.
    `waited_share` is the share of its time in which the worker wanted to run and its core was given
    to something else; that time is not in the samples.

    Raises `ValueError` for costs by which a step takes no time.
    """

    version: int = VERSION
    identity: Identity
    model: str
    transport: str
    versions: dict[str, str]
    date: str
    repeats: int
    seed: int
    loop_s: float
    waited_share: float
    kv: KvRoom
    steps: tuple[StepPoint, ...]
    handoffs: tuple[HandoffPoint, ...]
    fit: Fit
    chunk: Chunk

    def __post_init__(self) -> None:
        if min(self.costs.prefill_s(1, 1), self.costs.decode_step_s(1, 1)) <= 0.0:
            raise ValueError("a step takes no time by its costs")

    @property
    def costs(self) -> CostModel:
        return self.fit.costs

    @property
    def noise(self) -> float:
        """The median over all steps of how far a point's samples lie apart."""
        return statistics.median(point.spread for point in self.steps)
