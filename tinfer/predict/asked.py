"""What a predictor is asked and told: requests as they arrive, and how their answers ended."""

from __future__ import annotations

import enum
from typing import Protocol, runtime_checkable

from msgspec import Struct

from tinfer.core.lengths import Lengths


class Features(Struct, frozen=True):
    """What is kept of a prompt: hashes, of which `tinfer.predict.features` says how they are made.

    `model` is the name's, `head` the prompt's beginning's, which a tenant's requests share, and
    `signature` tells which prompts are alike. 0 and empty mean that nothing is known.
    """

    model: int = 0
    head: int = 0
    signature: bytes = b""


class Asked(Struct, frozen=True):
    """What is known of a request when it arrives.

    `output_tokens` is the true length of its answer where it is known: to a simulation, and in a
    benchmark that has the answer run to its bound; None anywhere else. Only oracles look at it.
    `runs_to_bound`: its client has the answer go on until it is `max_output_tokens` long.
    `expected_output_tokens`, at least 1, is what the client says; only `hints` looks at it.
    """

    request_id: str
    prompt_tokens: int
    max_output_tokens: int
    output_tokens: int | None = None
    runs_to_bound: bool = False
    features: Features = Features()
    expected_output_tokens: int | None = None


class End(enum.Enum):
    """STOP: the answer ended by itself. The others cut it: its bound, its client, a failure."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Predictor(Protocol):
    """Says how long an answer will be; equal questions get equal answers until something is
    observed."""

    def predict(self, asked: Asked) -> Lengths: ...


@runtime_checkable
class LearningPredictor(Predictor, Protocol):
    """One that wants to be told of the end of every request, and wants `Asked.features`."""

    def observe(self, asked: Asked, output_tokens: int, end: End) -> None:
        """The answer is over, after so many tokens."""
        ...
