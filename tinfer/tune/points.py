"""The measurements: how long an engine's steps and hand-offs took, and what was in them."""

from __future__ import annotations

import statistics
from typing import Annotated, Literal

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
StepKind = Literal["prefill", "later-chunk", "decode", "mixed"]


class StepPoint(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engine steps with one composition, in the words of `tinfer.core.costs.CostModel`.

    `prefill`: a prompt alone in one step; `later-chunk`: a chunk behind others of its prompt;
    `decode`: only sequences that decode; `mixed`: a prompt in one step beside those. `samples_s`
    has one entry per step, from its begin to the begin of what could follow it on that worker,
    without what the worker waited for its core meanwhile.
    """

    kind: StepKind
    prefill_tokens: int = 0
    context_tokens: float = 0.0
    num_decodes: int = 0
    kv_tokens: float = 0.0
    samples_s: tuple[float, ...]

    @property
    def step_s(self) -> float:
        """The median."""
        return statistics.median(self.samples_s)

    @property
    def spread(self) -> float:
        """How far samples lie apart: the distance of the outer quartiles over the median."""
        if len(self.samples_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return (high - low) / self.step_s


class HandoffPoint(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hand-offs of prompts of one length between two workers of the box, both otherwise idle.

    `samples_s`: from the master's order to the decode worker until its word that the blocks are
    installed, both messages included; `copy_samples_s`: the copy alone, by the reader's clock.
    """

    tokens: int
    num_bytes: int
    samples_s: tuple[float, ...]
    copy_samples_s: tuple[float, ...]

    @property
    def handoff_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def copy_s(self) -> float:
        return statistics.median(self.copy_samples_s)


class KvRoom(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV cache of the worker that was measured, as its engine built it.

    `num_blocks` leaves out the block that the engine keeps for itself; `kv_bytes` is the whole
    buffer, on all ranks together, and `bytes_per_token` what a token takes of it.
    """

    num_blocks: Positive
    block_tokens: Positive
    kv_bytes: int
    bytes_per_token: float
    max_num_seqs: Positive
    max_model_len: Positive
    step_tokens: Positive

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens
