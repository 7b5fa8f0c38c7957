"""The settings of the fake engine, each declared once: name, bounds, default, meaning."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tinfer.wire.control import WorkerSpec

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

# Source of these two: the class defaults of vLLM 0.32's SchedulerConfig.
DEFAULT_MAX_NUM_SEQS = 128
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_MAX_MODEL_LEN = 32768


class FakeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What `WorkerSpec.fake` may say. All workers of one server get the same.

    `seed` and `vocab_size` make the model: together with a prompt and a sampling seed they fix
    every token. A step takes `step_s + prefill_token_s * prompt tokens + decode_seq_s * decoding
    sequences`, give or take a share of `jitter`; with `steady` 1 the next one begins when that has
    passed, whatever this process did in between. A pull takes `pull_block_s` per block, one pull
    after the other. An answer ends by itself with probability 1 / `mean_output_tokens` at each
    token. Without `max_model_len` a request may fill the whole pool, up to 32768 tokens.
    """

    num_blocks: Positive = 4096
    block_tokens: Positive = 16
    max_model_len: Positive | None = None
    vocab_size: Annotated[int, Meta(ge=64)] = 512
    seed: int = 0
    mean_output_tokens: Positive = 128
    start_s: Seconds = 0.0  # what building the engine takes
    step_s: Seconds = 0.0
    prefill_token_s: Seconds = 0.0
    decode_seq_s: Seconds = 0.0
    pull_block_s: Seconds = 0.0
    jitter: Share = 0.0
    steady: Annotated[int, Meta(ge=0, le=1)] = 0
    fail_pull_rate: Share = 0.0  # pulls that fail although nothing is wrong
    refuse_prompt_tokens: Positive | None = None  # longer prompts are refused, as a client's fault
    die_after_steps: Positive | None = None  # the process ends in the middle of this computing step
    poison_prompt_tokens: Positive | None = None  # and of one that computes a prompt of this length

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together that one request may have."""
        return self.max_model_len or min(DEFAULT_MAX_MODEL_LEN, self.num_blocks * self.block_tokens)


class FakeLimits(Struct, frozen=True):
    """What bounds one step, by vLLM's names."""

    max_num_seqs: int
    max_num_batched_tokens: int


def settings_of(spec: WorkerSpec) -> FakeSettings:
    """The settings of a worker; `block_size` and `max_model_len` of its engine arguments fill in.

    Raises `ValueError` for an unknown name or a bad value.
    """
    # Values from the command line are floats, whole numbers included.
    values = {
        name: int(value) if float(value).is_integer() else value
        for name, value in spec.fake.items()
    }
    for name, ours in (("block_size", "block_tokens"), ("max_model_len", "max_model_len")):
        if name in spec.engine_args:
            values.setdefault(ours, int(spec.engine_args[name]))
    try:
        settings = msgspec.convert(values, FakeSettings)
    except msgspec.ValidationError as error:
        raise ValueError(f"fake engine: {error}") from error
    if settings.longest > settings.num_blocks * settings.block_tokens:
        raise ValueError(
            f"fake engine: {settings.num_blocks} blocks of {settings.block_tokens} tokens hold no "
            f"request of max_model_len {settings.longest}"
        )
    return settings


def limits_of(spec: WorkerSpec) -> FakeLimits:
    """Sequences and tokens per step. Raises `ValueError` if one is not positive."""
    arguments = spec.engine_args
    limits = FakeLimits(
        int(arguments.get("max_num_seqs", DEFAULT_MAX_NUM_SEQS)),
        int(arguments.get("max_num_batched_tokens", DEFAULT_MAX_NUM_BATCHED_TOKENS)),
    )
    if min(limits.max_num_seqs, limits.max_num_batched_tokens) < 1:
        raise ValueError("fake engine: max_num_seqs and max_num_batched_tokens must be positive")
    return limits
