"""Which points are measured: sizes, contexts, batches, by what the engine can hold and how fast it
is. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tinfer.tune.points import KvRoom

MIN_PROMPT_TOKENS = 16
# Decode steps looked at in a visit of one point, and those before them that are not counted, in
# which the last prompts are still computed or kernels are met for the first time.
NUM_DECODE_STEPS = 24
NUM_SETTLING_STEPS = 4
SHORT_PROMPT_TOKENS = 64
# The long prompts of decode points: the largest for which a batch of so many fits into the KV cache
# and is computed within `PREPARE_S`.
LONG_PROMPT_TOKENS = (4096, 2048, 1024, 512, 256, 128)
LONG_BATCH = 8
PREPARE_S = 8.0
# Of the KV cache, so that nothing is preempted.
USED_SHARE = 0.9
MIXED_BATCHES = (1, 4, 16)
# Chunks of one long prompt, at most this many of each size.
MAX_CHUNKS = 8
HANDOFF_TOKENS = (16, 128, 512, 1024, 2048, 4096)


class Prompt(NamedTuple):
    """A prompt alone, computed in steps of a chunk each."""

    tokens: int
    chunk_tokens: int


class Batch(NamedTuple):
    """So many sequences that decode, after prompts of this length."""

    num_decodes: int
    prompt_tokens: int


class MixedStep(NamedTuple):
    """A prompt beside a batch that decodes."""

    batch: Batch
    prefill_tokens: int


Point = Prompt | Batch | MixedStep


def prefill_sizes(room: KvRoom) -> list[int]:
    """Powers of two and what lies in the middle between them, up to a step's or the model's limit,
    which is the last."""
    limit = min(room.step_tokens, room.max_model_len - 1, int(USED_SHARE * room.num_tokens))
    sizes = {limit}
    size = MIN_PROMPT_TOKENS
    while size <= limit:
        sizes.update(n for n in (size, size * 3 // 2) if n <= limit)
        size *= 2
    return sorted(sizes)


def chunked_prompts(room: KvRoom, chunk_tokens: int) -> list[Prompt]:
    """For later chunks: of the size to serve with, and of a quarter of it."""
    limit = min(room.max_model_len - 1, int(USED_SHARE * room.num_tokens))
    largest = min(chunk_tokens, room.step_tokens)
    found = []
    for chunk in dict.fromkeys((largest, max(1, largest // 4))):
        num_chunks = min(MAX_CHUNKS, limit // chunk)
        if num_chunks >= 2:
            found.append(Prompt(num_chunks * chunk, chunk))
    return found


def answer_tokens(batch: Batch, room: KvRoom) -> int:
    """How long the answers of a batch have to be for `NUM_DECODE_STEPS` steps of all of it: the
    first sequences decode already while the prompts of the last are computed, in a step more than
    they need where the first one begins without the others."""
    num_ramp_steps = 1 + -(-batch.num_decodes * batch.prompt_tokens // room.step_tokens)
    return 1 + NUM_SETTLING_STEPS + num_ramp_steps + NUM_DECODE_STEPS


def batches(room: KvRoom, prefill_token_s: float) -> list[Batch]:
    """Powers of two of sequences, and as many as a worker takes, at two prompt lengths: what fits
    into the KV cache and whose prompts are computed in `PREPARE_S`, one sequence in any case."""
    found = []
    for prompt_tokens in _prompt_lengths(room, prefill_token_s):
        for num in _doubling(room.max_num_seqs):
            batch = Batch(num, prompt_tokens)
            slow = num > 1 and _prepare_s(batch, prefill_token_s) > PREPARE_S
            if fits(batch, room) and not slow:
                found.append(batch)
    return found


def mixed_steps(room: KvRoom, chunk_tokens: int, known: Sequence[Batch]) -> list[MixedStep]:
    """Prompts of a chunk and of a quarter of it beside some of the batches that are measured."""
    shortest = min((batch.prompt_tokens for batch in known), default=0)
    found = []
    for batch in known:
        if batch.prompt_tokens != shortest or batch.num_decodes not in MIXED_BATCHES:
            continue
        largest = min(chunk_tokens, room.step_tokens - batch.num_decodes, room.max_model_len - 1)
        sizes = dict.fromkeys((largest, max(1, largest // 4)))
        if batch.num_decodes < room.max_num_seqs:
            found += [MixedStep(batch, size) for size in sizes if size > 0]
    return found


def handoff_sizes(room: KvRoom, prefill_token_s: float) -> list[int]:
    """Prompt lengths whose KV is handed over; the prefill of each comes first."""
    limit = min(room.max_model_len - 2, int(USED_SHARE * room.num_tokens))
    sizes = [n for n in HANDOFF_TOKENS if n <= limit and n * prefill_token_s <= PREPARE_S]
    return sizes or [min(limit, HANDOFF_TOKENS[0])]


def fits(batch: Batch, room: KvRoom) -> bool:
    """Whether the whole batch can decode at once without a preemption."""
    longest = batch.prompt_tokens + answer_tokens(batch, room)
    num_blocks = batch.num_decodes * -(-longest // room.block_tokens)
    return longest <= room.max_model_len and num_blocks <= USED_SHARE * room.num_blocks


def _prompt_lengths(room: KvRoom, prefill_token_s: float) -> Iterator[int]:
    short = SHORT_PROMPT_TOKENS
    while short > 1 and not fits(Batch(1, short), room):
        short //= 2
    yield short
    for long in LONG_PROMPT_TOKENS:
        batch = Batch(min(LONG_BATCH, room.max_num_seqs), long)
        if long > short and fits(batch, room) and _prepare_s(batch, prefill_token_s) <= PREPARE_S:
            yield long
            return


def _doubling(limit: int) -> list[int]:
    """1, 2, 4 ... and the limit itself."""
    return [*(1 << i for i in range(limit.bit_length()) if 1 << i < limit), limit]


def _prepare_s(batch: Batch, prefill_token_s: float) -> float:
    return batch.num_decodes * batch.prompt_tokens * prefill_token_s
