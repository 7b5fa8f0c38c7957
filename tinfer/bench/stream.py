"""Reads the answer of one request off the socket, at the least cost that still sees every failure.

An event costs one search for a line end and one decoding that reads over what it does not need:
what the client spends per token is taken from the server under test where both share cores.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from tinfer.bench.outcome import Outcome
from tinfer.client.results import ErrorInfo, Usage

MAX_EVENT_BYTES = 16 << 20
_DONE = b"[DONE]"


class _Choice(Struct):
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: ErrorInfo | None = None
    tinfer: dict[str, Any] | None = None


_DECODER = msgspec.json.Decoder(_Chunk)


class BadStream(Exception):
    """The stream is not what an OpenAI-compatible server sends, or carries an error event."""


class EventLines:
    """Cuts bytes, in pieces cut anywhere, into the data of each event.

    JSON has no line end inside, so every `data:` line is one whole event; comments and other
    fields are read over.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the lines that this piece ends. Raises `BadStream` for an endless one."""
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BadStream(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class AnswerReader:
    """Fills one `Outcome` from the bytes of its stream."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._lines = EventLines()
        self._is_done = False

    def feed(self, piece: bytes, now_s: float) -> None:
        """Take what was read at `now_s`. Raises `BadStream`."""
        for data in self._lines.feed(piece):
            if data == _DONE:
                self._is_done = True
            elif data:
                self._take(data, now_s)

    def close(self, now_s: float) -> None:
        """The stream has ended. Raises `BadStream` where the answer has not."""
        self.feed(b"\n", now_s)
        outcome = self._outcome
        if not outcome.chunk_s:
            raise BadStream("the stream ended before the first token")
        if not self._is_done and outcome.finish_reason is None:
            raise BadStream("the stream ended before the answer did")
        if not outcome.has_usage:
            outcome.output_tokens = len(outcome.chunk_s)

    def _take(self, data: bytes, now_s: float) -> None:
        try:
            chunk = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadStream(f"an event that is no completion chunk: {error}") from error
        if chunk.error is not None:
            raise BadStream(chunk.error.message)
        outcome = self._outcome
        if chunk.choices:
            outcome.chunk_s.append(now_s)
            outcome.finish_reason = chunk.choices[0].finish_reason or outcome.finish_reason
        if chunk.tinfer is not None:
            outcome.trace = chunk.tinfer
        if chunk.usage is not None:
            self._count(chunk.usage)

    def _count(self, usage: Usage) -> None:
        outcome = self._outcome
        if usage.completion_tokens is None:
            return
        outcome.has_usage = True
        outcome.output_tokens = usage.completion_tokens
        outcome.prompt_tokens = usage.prompt_tokens or outcome.prompt_tokens
        if usage.prompt_tokens_details is not None:
            outcome.cached_tokens = usage.prompt_tokens_details.cached_tokens
