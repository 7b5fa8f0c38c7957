"""How a request that has emitted tokens begins again where its worker died.

Two forms. *Exact*: the prompt as it was, and every emitted token forced, one step each: the random
generator, the grammar, penalties and stop strings are then where they were. *Fast*, where none of
those can tell the difference: all but the last few emitted tokens are prompt, one prefill instead
of a step each. Those last few are forced in both forms: they bring the detokeniser to where it was,
in the middle of a character too.
"""

from __future__ import annotations

from array import array

from msgspec import Struct
from msgspec.structs import replace

from tinfer.core.events import Remainder
from tinfer.core.sampling import SamplingSpec

# A character has four bytes of UTF-8 at most, each of which may be a token of its own.
NUM_REPLAYED = 8


class Attempt(Struct):
    """One start of a request: `num_moved` of its emitted tokens are prompt, the others are forced.

    `text_before` is the length of the text that stands for those moved: what a worker says of text
    comes after it. Not known (None) until the last forced token is out, since the text that the
    client has ends there. `num_decodes` workers were told to pull its blocks and decode.
    """

    num_moved: int = 0
    text_before: int | None = 0
    num_decodes: int = 0


def is_exact(sampling: SamplingSpec) -> bool:
    """Whether what was emitted decides about more than the tokens that follow it."""
    return bool(
        sampling.seed is not None
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.structured is not None
        or sampling.logprobs is not None
        or sampling.min_tokens
        or sampling.stop
        or sampling.bad_words
    )


def next_attempt(sampling: SamplingSpec, num_emitted: int) -> Attempt:
    """How to start a request of which the client has that many tokens."""
    num_moved = 0 if is_exact(sampling) else max(0, num_emitted - NUM_REPLAYED)
    return Attempt(num_moved, None if num_moved else 0)


def remainder(
    request_id: str, prompt_tokens: int, sampling: SamplingSpec, num_emitted: int
) -> Remainder:
    """The same as the scheduler counts it."""
    num_moved = next_attempt(sampling, num_emitted).num_moved
    return Remainder(
        request_id, prompt_tokens + num_moved, sampling.max_tokens - num_moved, num_emitted
    )


def to_start(
    attempt: Attempt, prompt: bytes, emitted: array[int], sampling: SamplingSpec
) -> tuple[bytes, bytes, SamplingSpec]:
    """Prompt, forced tokens and sampling of a start, token ids as int32."""
    num_moved = attempt.num_moved
    if not num_moved:
        return prompt, emitted.tobytes(), sampling
    moved, forced = emitted[:num_moved].tobytes(), emitted[num_moved:].tobytes()
    return prompt + moved, forced, replace(sampling, max_tokens=sampling.max_tokens - num_moved)


def text_before(
    attempt: Attempt, num_tokens: int, text_len: int, len_text: int, has: tuple[int, int]
) -> int:
    """Where a worker's text begins, as of an output that ends with `num_tokens` of the answer and
    `text_len` of its own text, the last `len_text` of them new. `has` are the tokens and the length
    of text that the client has."""
    if attempt.text_before is None:
        delivered_tokens, delivered_text_len = has
        if num_tokens < delivered_tokens:
            return delivered_text_len - text_len  # nothing of it is new
        known_len = text_len if num_tokens == delivered_tokens else text_len - len_text
        attempt.text_before = delivered_text_len - known_len
    return attempt.text_before
