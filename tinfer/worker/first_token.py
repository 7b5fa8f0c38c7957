"""Makes an engine emit given tokens first, as if it had sampled them.

The decode worker continues from exactly the token that the client already has. Forcing it as the
engine's own first output, instead of appending it to the prompt, keeps the random generator, the
grammar, penalties, stop strings, logprobs and usage where a single engine would have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FORCED_TOKENS = "tinfer_forced_tokens"


class ForceTokens(LogitsProcessor):
    """Forces `SamplingParams.extra_args[FORCED_TOKENS]`, a list of token ids, one step each.

    vLLM runs it after grammar masks, `min_tokens` and `logit_bias` and before penalties,
    temperature and top-k/p, none of which can undo a row with one finite logit.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _forced_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [num_rows, vocab_size], changed in place for rows with tokens still to force."""
        done = []
        for row, (forced, output_ids) in self._rows.items():
            position = len(output_ids)
            if position >= len(forced):
                done.append(row)
                continue
            logits[row] = float("-inf")
            logits[row, forced[position]] = 0.0
        for row in done:
            del self._rows[row]
        return logits


def _forced_of(
    params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
) -> tuple[list[int], list[int]] | None:
    """The tokens to force and the live list of outputs, for rows that have any left."""
    forced = (params.extra_args or {}).get(FORCED_TOKENS)
    if not forced or len(output_ids) >= len(forced):
        return None
    return forced, output_ids
