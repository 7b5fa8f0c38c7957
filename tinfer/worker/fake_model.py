"""The fake engine's model: every token is a fixed function of the tokens before it.

So an answer does not depend on batching, chunks, preemption, worker or route, and a request that
goes on elsewhere with its emitted tokens as part of the prompt gets the same continuation. The text
is made to be awkward: some tokens have no text, and some release theirs only with the next token,
as an incomplete UTF-8 character does.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

from tinfer.core.sampling import SamplingSpec, TokenLogprobs
from tinfer.worker.fake_settings import FakeSettings

EOS_TOKEN = 0
DIGEST_BYTES = 16
TOKEN_BYTES = 4

FinishReason = Literal["stop", "length", "abort", "error"]

_MASK = (1 << 64) - 1
# Multipliers of a 64-bit mixer. Source: splitmix64 (Steele, Lea, Flood 2014).
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_WRONG_KV = 0x5DEECE66D1234567

_EMPTY_EVERY, _LATE_EVERY = 13, 8
_CONSONANTS, _VOWELS = "bdfgklmnprst", "aeiou"


class FakeModel:
    """What all answers of one engine share."""

    def __init__(self, settings: FakeSettings) -> None:
        self.vocab_size = settings.vocab_size
        self.block_tokens = settings.block_tokens
        self.max_model_len = settings.longest
        self.root = blake2b(b"%d" % settings.seed, digest_size=DIGEST_BYTES).digest()
        self.eos_below = (1 << 32) // settings.mean_output_tokens
        self.pieces = [_piece(token) for token in range(settings.vocab_size)]

    def logprobs(self, noise: int, token: int, count: int) -> TokenLogprobs:
        """The sampled token first, then the next ones; -1 asks for the whole vocabulary."""
        size = self.vocab_size
        best = -0.01 - (noise >> 40) / (1 << 24)
        num_entries = size if count < 0 else min(size, max(1, count))
        token_ids = [token, *((token + i) % size for i in range(1, num_entries))]
        return TokenLogprobs(
            token_ids=token_ids,
            logprobs=[best - i for i in range(num_entries)],
            ranks=list(range(1, num_entries + 1)),
            tokens=[self.pieces[token % size] for token in token_ids],
        )

    def prompt_logprobs(self, prompt: bytes, count: int) -> list[TokenLogprobs | None]:
        """One entry per prompt token; the first has none."""
        known: list[TokenLogprobs | None] = [None]
        for position, token in enumerate(token_ids_of(prompt)[1:], 1):
            known.append(self.logprobs(_mix(position << 32 | token), token, count))
        return known


class Context:
    """The tokens so far, as one digest per block and a running 64-bit state."""

    __slots__ = ("_block_bytes", "_digest", "_tail", "_whole", "salt", "state")

    def __init__(self, model: FakeModel, prompt: bytes, seed: int | None) -> None:
        size = self._block_bytes = model.block_tokens * TOKEN_BYTES
        self._digest = model.root
        # Of the blocks that are full, and the tokens of the one that is not.
        self._whole: list[bytes] = []
        for end in range(size, len(prompt) + 1, size):
            self._digest = _chain(self._digest, prompt[end - size : end])
            self._whole.append(self._digest)
        num_full = len(self._whole)
        self._tail = bytearray()
        self.salt = _mix((seed or 0) & _MASK)
        self.state = int.from_bytes(self._digest[:8], "little")
        for token in token_ids_of(prompt[num_full * size :]):
            self.append(token)

    def append(self, token: int) -> None:
        self._tail += token.to_bytes(TOKEN_BYTES, "little")
        if len(self._tail) < self._block_bytes:
            self.state = ((self.state ^ token) * _MULTIPLIER_1 + token + 1) & _MASK
            return
        self._digest = _chain(self._digest, bytes(self._tail))
        self._whole.append(self._digest)
        self._tail.clear()
        self.state = int.from_bytes(self._digest[:8], "little")

    def digests(self) -> list[bytes]:
        """One per block, the last one of as many tokens as there are."""
        last = [_chain(self._digest, bytes(self._tail))] if self._tail else []
        return self._whole + last

    def noise(self) -> int:
        """64 bits that decide the next token."""
        return _mix(self.state ^ self.salt)


class Answer:
    """One answer, token by token; `advance` leaves what the new token brought in the fields.

    `continues` is for the prefill of an answer that another worker continues: it ends with its
    first token, and its text is that of an unfinished request. The `forced` tokens are emitted
    first, whatever the model says. Ends and stop strings follow vLLM's order of checks.
    """

    __slots__ = (
        "_context",
        "_forced",
        "_hold_back",
        "_late",
        "_masked",
        "_max_tokens",
        "_model",
        "_released",
        "_sampling",
        "_text",
        "continues",
        "finish_reason",
        "logprobs",
        "num_tokens",
        "stop_reason",
        "text",
    )

    def __init__(
        self,
        model: FakeModel,
        prompt: bytes,
        sampling: SamplingSpec,
        forced: Sequence[int] = (),
        continues: bool = False,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._context = Context(model, prompt, sampling.seed)
        self._forced = forced
        self.continues = continues
        room = model.max_model_len - len(prompt) // TOKEN_BYTES
        self._max_tokens = 1 if continues else min(sampling.max_tokens, room)
        self._masked = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self._masked |= {EOS_TOKEN}
        shown = sampling.include_stop_str_in_output
        self._hold_back = 0 if shown or not sampling.stop else max(map(len, sampling.stop)) - 1
        self._text = ""
        self._released = 0
        # The prompt's last token may still owe text, which then opens the answer.
        self._late = ""
        self._decode(int.from_bytes(prompt[-TOKEN_BYTES:], "little"))
        self.num_tokens = 0
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: TokenLogprobs | None = None

    @property
    def digests(self) -> list[bytes]:
        """What the KV block of each `block_tokens` tokens of prompt and answer holds: a digest of
        all tokens up to its end, or to the last one so far. Which of them came as prompt makes no
        difference."""
        return self._context.digests()

    def spoil(self) -> None:
        """Go on as a model would whose KV is another prompt's: with other tokens."""
        self._context.salt ^= _WRONG_KV

    def advance(self) -> int:
        """Sample the next token and return it."""
        sampling = self._sampling
        noise = self._context.noise()
        token = self._draw(noise)
        self.num_tokens += 1
        if sampling.logprobs is not None:
            self.logprobs = self._model.logprobs(noise, token, sampling.logprobs)
        if token in self._masked:
            self.finish_reason = "stop"
            if token != EOS_TOKEN or sampling.ignore_eos:
                self.stop_reason = token
        elif self.num_tokens >= self._max_tokens:
            self.finish_reason = "length"
        hidden = self.finish_reason == "stop" and not sampling.include_stop_str_in_output
        piece = "" if hidden else self._decode(token)
        self.text = self._release(piece) if sampling.stop else piece
        self._context.append(token)
        return token

    def _draw(self, noise: int) -> int:
        if self.num_tokens < len(self._forced):
            return self._forced[self.num_tokens]
        size = self._model.vocab_size
        ends = noise >> 32 < self._model.eos_below
        token = EOS_TOKEN if ends else 1 + noise % (size - 1)
        if self.num_tokens < self._sampling.min_tokens and token in self._masked:
            others = ((token + i) % size for i in range(1, size))
            return next((other for other in others if other not in self._masked), token)
        return token

    def _decode(self, token: int) -> str:
        """The text that this token completes."""
        if token == EOS_TOKEN:
            piece = "" if self._sampling.skip_special_tokens else "</s>"
        else:
            piece = self._model.pieces[token % self._model.vocab_size]
        late, self._late = self._late, ""
        if token % _LATE_EVERY == 5:
            self._late = piece
            return late
        return late + piece

    def _release(self, piece: str) -> str:
        """The text to emit now: up to a stop string, or short of what may become one."""
        self._text += piece
        if piece and self.num_tokens > self._sampling.min_tokens:
            self._cut_at_stop(len(piece))
        open_ended = self.finish_reason is None or (
            self.continues and self.finish_reason == "length"
        )
        end = len(self._text) - (self._hold_back if open_ended else 0)
        if end <= self._released:
            return ""
        text = self._text[self._released : end]
        self._released = end
        return text

    def _cut_at_stop(self, num_new: int) -> None:
        """End the text at the stop string that is complete first, of those that end in the last
        `num_new` characters."""
        text = self._text
        first_end, found = len(text) + 1, None
        for stop in self._sampling.stop:
            at = text.find(stop, max(0, len(text) - num_new - len(stop) + 1))
            if 0 <= at and at + len(stop) < first_end:
                first_end, found = at + len(stop), stop
        if found is None:
            return
        shown = self._sampling.include_stop_str_in_output
        self._text = text[: first_end if shown else first_end - len(found)]
        self.finish_reason, self.stop_reason = "stop", found


def expected_answer(
    prompt_token_ids: Sequence[int], sampling: SamplingSpec, settings: FakeSettings
) -> tuple[list[int], str, FinishReason, int | str | None]:
    """The token ids, text, finish reason and stop reason that any fake engine with these settings
    gives, on any route."""
    answer = Answer(_model_of(settings), prompt_bytes(prompt_token_ids), sampling)
    token_ids, text = [], ""
    while answer.finish_reason is None:
        token_ids.append(answer.advance())
        text += answer.text
    return token_ids, text, answer.finish_reason, answer.stop_reason


@functools.cache
def _model_of(settings: FakeSettings) -> FakeModel:
    """Nothing in it ever changes, and it takes longer to make than an answer."""
    return FakeModel(settings)


def prompt_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32, as `Start.prompt` carries them."""
    tokens = array("i", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def token_ids_of(prompt: bytes) -> array[int]:
    """The reverse of `prompt_bytes`, but for negative ids, which stay harmless that way."""
    tokens = array("I")
    tokens.frombytes(prompt)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def _chain(digest: bytes, tokens: bytes) -> bytes:
    return blake2b(digest + tokens, digest_size=DIGEST_BYTES).digest()


def _mix(state: int) -> int:
    state = ((state ^ state >> 30) * _MULTIPLIER_1) & _MASK
    state = ((state ^ state >> 27) * _MULTIPLIER_2) & _MASK
    return state ^ state >> 31


def _piece(token: int) -> str:
    if token == EOS_TOKEN:
        return "</s>"
    if token % _LATE_EVERY == 5:
        return chr(0x4E00 + token % 20000)  # three bytes of UTF-8 each
    if token % _EMPTY_EVERY == 7:
        return ""
    space = " " if token % 3 == 0 else ""
    return space + _CONSONANTS[token % len(_CONSONANTS)] + _VOWELS[token // 7 % len(_VOWELS)]
