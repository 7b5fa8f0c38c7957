"""From our sampling description to vLLM's, and from vLLM's logprobs to ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tinfer.core.sampling import SamplingSpec, StructuredSpec, TokenLogprobs
from tinfer.wire.messages import Start
from tinfer.worker.first_token import FORCED_TOKENS


def sampling_params(start: Start, transfer: dict[str, Any] | None) -> SamplingParams:
    """vLLM's parameters for one phase of a request. Raises `ValueError` for what vLLM refuses.

    A prefill samples one token of the request; a decode continues after the forced ones. Where any
    are forced no prompt logprobs are asked for: the client has them. `transfer` goes to the
    connector.
    """
    spec = start.sampling
    extra: dict[str, Any] = {}
    if transfer is not None:
        extra["kv_transfer_params"] = transfer
    if start.forced_tokens:
        extra[FORCED_TOKENS] = np.frombuffer(start.forced_tokens, dtype="<i4").tolist()
    prefill = start.kind == "prefill"
    return SamplingParams(
        n=1,
        max_tokens=1 if prefill else spec.max_tokens,
        min_tokens=min(1, spec.min_tokens) if prefill else spec.min_tokens,
        prompt_logprobs=None if start.forced_tokens else spec.prompt_logprobs,
        structured_outputs=_structured(spec.structured),
        extra_args=extra or None,
        output_kind=RequestOutputKind.DELTA,
        **_same_on_every_phase(spec),
    )


def _same_on_every_phase(spec: SamplingSpec) -> dict[str, Any]:
    return {
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k,
        "min_p": spec.min_p,
        "seed": spec.seed,
        "presence_penalty": spec.presence_penalty,
        "frequency_penalty": spec.frequency_penalty,
        "repetition_penalty": spec.repetition_penalty,
        "logit_bias": spec.logit_bias,
        "allowed_token_ids": spec.allowed_token_ids,
        "bad_words": spec.bad_words or None,
        "stop": spec.stop or None,
        "stop_token_ids": spec.stop_token_ids or None,
        "include_stop_str_in_output": spec.include_stop_str_in_output,
        "ignore_eos": spec.ignore_eos,
        "skip_special_tokens": spec.skip_special_tokens,
        "spaces_between_special_tokens": spec.spaces_between_special_tokens,
        "logprobs": spec.logprobs,
    }


def _structured(spec: StructuredSpec | None) -> StructuredOutputsParams | None:
    if spec is None:
        return None
    return StructuredOutputsParams(
        json=spec.json,
        regex=spec.regex,
        choice=spec.choice,
        grammar=spec.grammar,
        json_object=spec.json_object,
        structural_tag=spec.structural_tag,
        disable_any_whitespace=spec.disable_any_whitespace,
        whitespace_pattern=spec.whitespace_pattern,
    )


def token_logprobs(position: Mapping[int, Logprob]) -> TokenLogprobs:
    """One position's logprobs in vLLM's order: the sampled token first, then the top ones."""
    entries = list(position.values())
    return TokenLogprobs(
        token_ids=list(position),
        logprobs=[entry.logprob for entry in entries],
        ranks=[entry.rank or 0 for entry in entries],
        tokens=[entry.decoded_token or "" for entry in entries],
    )


def all_logprobs(
    positions: Sequence[Mapping[int, Logprob] | None] | None,
) -> list[TokenLogprobs | None] | None:
    """Prompt logprobs, whose first position has none."""
    if positions is None:
        return None
    return [None if position is None else token_logprobs(position) for position in positions]
