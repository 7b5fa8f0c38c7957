"""Keeps a seeded request alive through a chunked prefill on the CPU.

While a prompt is computed in chunks vLLM samples and discards a token per chunk, and winds the
request's generator back. CPU generators cannot be wound back: `set_offset` raises and the engine
dies. Rows whose token will be discarded therefore sample without their generator, which then stands
where it would stand after the wind-back.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def patch_cpu_runner() -> None:
    """Wrap `CPUModelRunner.sample_tokens`, once per process; idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original: Any = CPUModelRunner.sample_tokens
    if getattr(original, "_tinfer_seeded_chunks", False):
        return

    @functools.wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators
        if not generators:
            return original(self, grammar_output)
        discarded = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        rows = [int(row) for row in discarded if int(row) in generators]
        parked = {row: generators.pop(row) for row in rows}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(parked)

    sample_tokens._tinfer_seeded_chunks = True  # type: ignore[attr-defined]
    runner: Any = CPUModelRunner
    runner.sample_tokens = sample_tokens
