"""What things take on a worker, in seconds: the model by which decisions and the simulator count.

One engine step with `p` prefill tokens, `n` decoding sequences and `kv` tokens of KV read takes
`base_s + prefill_token_s p + prefill_context_s c + decode_seq_s n + kv_token_s kv`, where `c` sums
over the prefill tokens how many tokens each looks back at. `tinfer tune` measures the constants;
without it the paper's serve: a linear fit to its figure 2 for OPT-13B on two V100s (arXiv
2401.11181), within 9 % of every point but the smallest.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Seconds = Annotated[float, Meta(ge=0)]


class CostModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The constants of one device and model; `source` says where they are from, for a reader.

    `handoff_s` is a hand-off's fixed part, `handoff_token_s` what a prompt token adds to it.
    """

    base_s: Seconds = 0.027
    prefill_token_s: Seconds = 0.25e-3
    prefill_context_s: Seconds = 0.0
    decode_seq_s: Seconds = 0.645e-3
    kv_token_s: Seconds = 1e-6
    handoff_s: Seconds = 0.002
    handoff_token_s: Seconds = 0.0
    source: str = "the paper's OPT-13B on two V100"

    def step_s(
        self,
        prefill_tokens: int,
        num_decodes: int,
        kv_tokens: float,
        context_tokens: float = 0.0,
    ) -> float:
        """One engine step; `context_tokens` is the sum that the module explains."""
        return (
            self.base_s
            + self.prefill_token_s * prefill_tokens
            + self.prefill_context_s * context_tokens
            + self.decode_seq_s * num_decodes
            + self.kv_token_s * kv_tokens
        )

    def prefill_s(self, tokens: int, chunk_tokens: int, cached_tokens: int = 0) -> float:
        """A prompt of `tokens` alone on an engine, of which it has `cached_tokens` already."""
        num_new = max(1, tokens - cached_tokens)
        num_steps = -(-num_new // chunk_tokens)
        context = num_new * (cached_tokens + tokens) / 2.0
        return (
            num_steps * self.base_s
            + self.prefill_token_s * num_new
            + self.prefill_context_s * context
        )

    def decode_step_s(self, num_decodes: int, kv_tokens: float) -> float:
        """One step of a batch that only decodes."""
        return self.step_s(0, num_decodes, kv_tokens)

    def handoff_total_s(self, tokens: int) -> float:
        """From prefill done to installed, for a prompt of `tokens`."""
        return self.handoff_s + self.handoff_token_s * tokens
