"""One request of a workload, and the token ids of its prompt.

A prompt is a row of *segments*, each a seed and a number of tokens. Equal segments give equal
tokens whatever stands before them, so two prompts share exactly the tokens of their common leading
segments: a system prompt, or the turns of a conversation so far.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from msgspec import Struct


class Segment(NamedTuple):
    """A part of a prompt: `num_tokens` >= 1 tokens that follow from `seed` alone.

    Of two segments with one seed the shorter is a prefix of the longer.
    """

    seed: str
    num_tokens: int


class Request(Struct, frozen=True):
    """What a client asks for, and when.

    `arrival_s` >= 0 counts from the start of the run; 0 for all when all arrive at once. `task` is
    the request's class, such as "LPLD" or "code": service-level objectives are set per task.
    `tenant` and `session` are "" where a workload knows none. `turn` counts from 0 in a session.
    `output_tokens` >= 1 is how many tokens the answer has (a client asks for exactly as many and
    has the server ignore its end-of-sequence token).

    A later turn's prompt is the earlier turn's prompt, a stand-in for its answer (as many tokens
    as the answer has, but not the ones that a model really gives) and the new question. An
    open-loop run sends every request at its `arrival_s` and cannot wait for answers: a later turn
    may leave before the earlier one is answered, if the server is slower than the workload
    assumes. `after` is for closed-loop replay: the id of the request in the same list whose answer
    must have arrived first; None if there is none to wait for.
    """

    request_id: str
    arrival_s: float
    task: str
    segments: tuple[Segment, ...]
    output_tokens: int
    tenant: str = ""
    session: str = ""
    turn: int = 0
    after: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, at least 1."""
        return sum(segment.num_tokens for segment in self.segments)


def prompt_token_ids(
    request: Request, vocab_size: int, first_id: int = 0, salt: str = ""
) -> list[int]:
    """The prompt's token ids, uniform over `first_id` <= id < `vocab_size`.

    A segment's ids depend on its seed, the three arguments and nothing else. `first_id` keeps off
    a tokenizer's special tokens where they come first. Another `salt` gives other tokens of the
    same shape: for a second run against a server whose prefix cache remembers the first.
    Raises `ValueError` if there is no id to choose from.
    """
    num_ids = vocab_size - first_id
    if first_id < 0 or num_ids <= 0:
        raise ValueError(f"no token ids from {first_id} up to {vocab_size}")
    return [
        token_id
        for segment in request.segments
        for token_id in _segment_token_ids(segment, num_ids, first_id, salt)
    ]


def _segment_token_ids(segment: Segment, num_ids: int, first_id: int, salt: str) -> list[int]:
    # The salt's length keeps ("a", "b c") and ("a b", "c") apart.
    draw = random.Random(f"tinfer tokens {len(salt)} {salt} {segment.seed}").random
    return [first_id + int(draw() * num_ids) for _ in range(segment.num_tokens)]
