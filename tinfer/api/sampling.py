"""From a request's sampling fields to a `SamplingSpec`, with the range checks of vLLM 0.32.

Precedence: the request, then the model's `generation_config.json`, then vLLM's neutral defaults.
Source of every bound: vLLM 0.32 `SamplingParams` (`_verify_args`, `_verify_greedy_sampling`,
`verify`), its OpenAI request validators, and `renderers/params.py` for the lengths; of how many
and how long things may be: `limits.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from tinfer.api.limits import (
    INT64_MAX,
    INT64_MIN,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from tinfer.api.schemas import SamplingFields
from tinfer.api.structured import structured_spec
from tinfer.core.sampling import SamplingSpec
from tinfer.errors import InvalidRequest, PromptTooLong, StartError

T = TypeVar("T")


class SamplingDefaults(Struct, frozen=True):
    """What a model's `generation_config.json` says of sampling; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


class ModelLimits(Struct, frozen=True):
    """What a request is measured against; lengths in tokens."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int


def load_sampling_defaults(model_dir: Path) -> SamplingDefaults:
    """The defaults of a local model directory; neutral ones when it has no generation config.

    Raises `StartError` when the file is there but cannot be understood.
    """
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        return msgspec.json.decode(path.read_bytes(), type=SamplingDefaults)
    except (msgspec.MsgspecError, OSError) as error:
        raise StartError(f"cannot read {path}: {error}") from error


def base_spec(
    request: SamplingFields,
    defaults: SamplingDefaults,
    limits: ModelLimits,
    logprobs: int | None,
    prompt_logprobs: int | None,
    logprobs_param: str = "logprobs",
) -> SamplingSpec:
    """The checked spec of a request but for `max_tokens`, which `fit` sets for each prompt.

    Raises `InvalidRequest` with the name of the first field that is out of range.
    """
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    spec = SamplingSpec(
        max_tokens=1,
        min_tokens=request.min_tokens or 0,
        temperature=temperature,
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=_first(request.top_k, defaults.top_k, 0),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        seed=None if request.seed == -1 else request.seed,
        presence_penalty=_first(request.presence_penalty, defaults.presence_penalty, 0.0),
        frequency_penalty=_first(request.frequency_penalty, defaults.frequency_penalty, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias, limits.vocab_size),
        allowed_token_ids=request.allowed_token_ids,
        bad_words=list(dict.fromkeys(request.bad_words or [])),
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or [],
        stop_token_ids=list(dict.fromkeys(request.stop_token_ids or [])),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured=structured_spec(request.structured_outputs, request.response_format),
    )
    _check_numbers(spec)
    _check_lists(spec, limits.vocab_size)
    _check_logprobs(spec.logprobs, limits, logprobs_param)
    _check_logprobs(spec.prompt_logprobs, limits, "prompt_logprobs")
    _check_n(request.n, spec.temperature)
    return spec


def fit(
    spec: SamplingSpec,
    prompt_tokens: int,
    requested_tokens: int | None,
    limits: ModelLimits,
    param: str,
    max_tokens_param: str = "max_tokens",
) -> SamplingSpec:
    """`spec` with `max_tokens` for one prompt: what was asked for, cut to what the model has left.

    Raises `PromptTooLong` when the prompt leaves no room for a token or `requested_tokens` alone is
    longer than the model, `InvalidRequest` when the prompt is empty or the bounds contradict.
    """
    room = limits.max_model_len - prompt_tokens
    if requested_tokens is not None and requested_tokens > limits.max_model_len:
        raise PromptTooLong(
            f"{requested_tokens} tokens are more than the model's length of "
            f"{limits.max_model_len} tokens",
            param=max_tokens_param,
        )
    if prompt_tokens == 0:
        raise InvalidRequest("the prompt has no tokens", param=param)
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens and the model's length is "
            f"{limits.max_model_len}, which leaves no room for an answer",
            param=param,
        )
    max_tokens = room if requested_tokens is None else min(room, requested_tokens)
    if max_tokens < 1:
        raise InvalidRequest(f"must be at least 1, got {max_tokens}", param=max_tokens_param)
    if spec.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens={spec.min_tokens} is more than the {max_tokens} tokens that can be "
            "generated",
            param="min_tokens",
        )
    return msgspec.structs.replace(spec, max_tokens=max_tokens)


def children(spec: SamplingSpec, n: int) -> list[SamplingSpec]:
    """One spec per answer: child i has seed + i when a seed is set. Source: vLLM ParentRequest."""
    if spec.seed is None:
        return [spec] * n
    return [msgspec.structs.replace(spec, seed=spec.seed + i) for i in range(n)]


def _first(asked: T | None, default: T | None, neutral: T) -> T:
    if asked is not None:
        return asked
    return neutral if default is None else default


def _require(ok: bool, param: str, rule: str, got: object) -> None:
    if not ok:
        raise InvalidRequest(f"{param} {rule}, got {got}", param=param)


def _check_numbers(spec: SamplingSpec) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(spec, name)
        _require(-2.0 <= value <= 2.0, name, "must be in [-2, 2]", value)
    repetition = spec.repetition_penalty
    _require(
        math.isfinite(repetition) and repetition > 0.0,
        "repetition_penalty",
        "must be greater than 0",
        repetition,
    )
    _require(0.0 <= spec.temperature <= 2.0, "temperature", "must be in [0, 2]", spec.temperature)
    _require(0.0 < spec.top_p <= 1.0, "top_p", "must be in (0, 1]", spec.top_p)
    _require(
        -1 <= spec.top_k <= INT64_MAX,
        "top_k",
        "must be at least 1, or 0 or -1 for all tokens",
        spec.top_k,
    )
    _require(0.0 <= spec.min_p <= 1.0, "min_p", "must be in [0, 1]", spec.min_p)
    _require(spec.min_tokens >= 0, "min_tokens", "must be at least 0", spec.min_tokens)
    if spec.seed is not None:
        in_range = INT64_MIN <= spec.seed <= INT64_MAX
        _require(in_range, "seed", "must be a 64-bit signed integer", spec.seed)


def _check_n(n: int | None, temperature: float) -> None:
    if n is None:
        return
    _require(1 <= n <= MAX_N, "n", f"must be in [1, {MAX_N}]", n)
    _require(n == 1 or temperature > 0.0, "n", "must be 1 when temperature is 0", n)


def _check_lists(spec: SamplingSpec, vocab_size: int) -> None:
    _check_strings(spec.stop, "stop", MAX_STOP_STRINGS, MAX_STOP_CHARS)
    _check_strings(spec.bad_words, "bad_words", MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
    _check_count(spec.stop_token_ids, "stop_token_ids", MAX_STOP_TOKEN_IDS, "token ids")
    check_token_ids(spec.stop_token_ids, vocab_size, "stop_token_ids")
    if spec.allowed_token_ids is not None:
        _require(bool(spec.allowed_token_ids), "allowed_token_ids", "must not be empty", "[]")
        _check_count(spec.allowed_token_ids, "allowed_token_ids", vocab_size, "token ids")
        check_token_ids(spec.allowed_token_ids, vocab_size, "allowed_token_ids")


def _check_strings(strings: Sequence[str], param: str, most: int, most_chars: int) -> None:
    _check_count(strings, param, most, "strings")
    _require(all(strings), param, "must not hold an empty string", "one")
    longest = max(map(len, strings), default=0)
    _require(
        longest <= most_chars, param, f"takes strings of at most {most_chars} characters", longest
    )


def _check_count(given: Sized, param: str, most: int, what: str) -> None:
    _require(len(given) <= most, param, f"takes at most {most} {what}", len(given))


def check_token_ids(token_ids: Sequence[int] | Iterable[int], vocab_size: int, param: str) -> None:
    """Raises `InvalidRequest` when an id is not one of the model's `vocab_size` tokens."""
    bad = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(
            f"token id {bad} is not in the vocabulary of {vocab_size} tokens", param=param
        )


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    """Token id → bias, clamped to ±100 as vLLM does."""
    if bias is None:
        return None
    _check_count(bias, "logit_bias", MAX_LOGIT_BIAS_ENTRIES, "entries")
    clamped: dict[int, float] = {}
    for key, value in bias.items():
        try:
            token_id = int(key)
        except ValueError as error:
            raise InvalidRequest("a key is not a token id", param="logit_bias") from error
        clamped[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, value))
    check_token_ids(clamped, vocab_size, "logit_bias")
    return clamped


def _check_logprobs(count: int | None, limits: ModelLimits, param: str) -> None:
    if count is None:
        return
    most = limits.vocab_size if limits.max_logprobs == -1 else limits.max_logprobs
    _require(count >= -1, param, "must be at least 0, or -1 for all tokens", count)
    asked = limits.vocab_size if count == -1 else count
    _require(asked <= most, param, f"must be at most {most}", asked)
