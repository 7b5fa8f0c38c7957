"""The predictor that learns from what is served: no data, no model of its own, nothing to set up.

A ladder of survival curves (`curves`), each shrunk to the one below until it has answers enough:

    the prior > all answers > of the model > with that `max_tokens` > and prompts of that length
    > of that tenant > of that tenant, with that `max_tokens` and prompts of that length
    > of the latest prompts that are alike (`neighbours`)

Answers cut by `max_tokens`, aborted or failed count for the tokens that they had and say nothing
about where they would have ended. Old answers fade with every new one on the same rung. Memory is
constant: the rungs that were used last are kept. It reads no clock and draws nothing: equal
observations in equal order give equal predictions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from tinfer.core.lengths import Lengths, certain
from tinfer.predict.asked import Asked, End
from tinfer.predict.curves import (
    NUM_BINS,
    Row,
    count,
    cut_at,
    ended_at,
    lengths_of,
    lognormal,
    refined,
)
from tinfer.predict.neighbours import Neighbours
from tinfer.predict.predictors import PRIOR_MU, PRIOR_SIGMA

# What a rung is keyed by, from the lowest; each key belongs to the same list in every version.
RUNGS: tuple[tuple[str, ...], ...] = (
    (),
    ("model",),
    ("model", "bound"),
    ("model", "bound", "prompt"),
    ("model", "head"),
    ("model", "head", "bound", "prompt"),
)
Key = tuple[int, ...]


class OnlineSettings(Struct, frozen=True, kw_only=True):
    """How much is kept, and what of the ladder is used; the defaults are the predictor's.

    `num_rungs` curves are kept beside the one of all answers, and `num_recent` prompts. After
    `forget_after` more answers on its rung an old one counts 1/e. A curve's parent counts as
    `parent_answers` of its own. `censors` false takes every answer for a whole one, and `votes`
    false asks no neighbours: for comparisons.
    """

    num_rungs: Annotated[int, Meta(ge=len(RUNGS))] = 2048
    num_recent: Annotated[int, Meta(ge=1)] = 1024
    forget_after: Annotated[int, Meta(ge=2)] = 1024
    parent_answers: Annotated[float, Meta(gt=0)] = 6.0
    censors: bool = True
    votes: bool = True


class OnlinePredictor:
    """Implements `LearningPredictor`. `predict` changes nothing."""

    def __init__(self, settings: OnlineSettings | None = None) -> None:
        self.settings = settings = OnlineSettings() if settings is None else settings
        self._fading = np.float32(1.0 - 1.0 / settings.forget_after)
        self._prior = lognormal(PRIOR_MU, PRIOR_SIGMA)
        # Ends and those there to end, of every rung: [num_rungs, 2, NUM_BINS].
        self.counts = np.zeros((settings.num_rungs, 2, NUM_BINS), dtype=np.float32)
        # Where each rung's counts are, the rung that was used longest ago first.
        self.places: OrderedDict[Key, int] = OrderedDict()
        # Heads that came once: a prompt that nobody asks again needs no rung.
        self.heads: OrderedDict[int, None] = OrderedDict()
        self.neighbours = Neighbours(settings.num_recent)
        self.num_observed = 0

    @property
    def num_bytes(self) -> int:
        """Memory of all counts, which never changes; keys and heads come to some 600 bytes for each
        of `num_rungs` more. By default both together are under 4 MB."""
        return self.counts.nbytes + self.neighbours.num_bytes

    def predict(self, asked: Asked) -> Lengths:
        """How long the answer will be, as far as what was served so far tells."""
        if asked.runs_to_bound:
            return certain(asked.max_output_tokens)
        return lengths_of(self.curve(asked), asked.max_output_tokens)

    def curve(self, asked: Asked) -> Row:
        """The same, without the bound: hazards by bin, see `curves`."""
        curve = self._prior
        parent_answers = self.settings.parent_answers
        for key in self._keys(asked):
            place = self.places.get(key)
            if place is not None:
                ends, there = self.counts[place]
                curve = refined(curve, ends, there, parent_answers)
        vote = self.neighbours.vote(asked.features.signature) if self.settings.votes else None
        return curve if vote is None else refined(curve, *vote, parent_answers)

    def observe(self, asked: Asked, output_tokens: int, end: End) -> None:
        """An answer is over, after `output_tokens`. Of one without a token nothing is learnt, nor
        of one that was not to end before its bound."""
        if output_tokens < 1 or asked.runs_to_bound:
            return
        is_whole = end is End.STOP or not self.settings.censors
        seen = ended_at(output_tokens) if is_whole else cut_at(output_tokens)
        for key in self._keys(asked):
            if self._is_known(key, asked.features.head):
                count(self._row(key), seen, self._fading)
        if self.settings.votes:
            self.neighbours.add(asked.features.signature, seen)
        self._note_head(asked.features.head)
        self.num_observed += 1

    def _keys(self, asked: Asked) -> Iterator[Key]:
        """One per rung, from the lowest: the rung's place in RUNGS, and what it is keyed by."""
        features = asked.features
        parts = {
            "model": features.model,
            "head": features.head,
            "bound": asked.max_output_tokens.bit_length(),
            "prompt": asked.prompt_tokens.bit_length(),
        }
        for number, rung in enumerate(RUNGS):
            if "head" not in rung or features.head:
                yield (number, *(parts[name] for name in rung))

    def _is_known(self, key: Key, head: int) -> bool:
        """Whether that key has a rung, or is to get one."""
        is_headless = "head" not in RUNGS[key[0]]
        return is_headless or key in self.places or head in self.heads

    def _row(self, key: Key) -> Row:
        """The counts of a rung, [2, NUM_BINS]; a new one takes the place that was used least
        recently."""
        place = self.places.get(key)
        if place is None:
            is_full = len(self.places) == len(self.counts)
            place = self.places.popitem(last=False)[1] if is_full else len(self.places)
            self.counts[place] = 0.0
            self.places[key] = place
        self.places.move_to_end(key)
        row: Row = self.counts[place]
        return row

    def _note_head(self, head: int) -> None:
        self.heads[head] = None
        self.heads.move_to_end(head)
        if len(self.heads) > 2 * self.settings.num_rungs:
            self.heads.popitem(last=False)
