"""The stream of one request: the dispatcher pushes, one client reads.

Nothing is queued per step: what the reader has not taken yet merges into one delta, so a stream
holds at most one answer's worth of text and tokens, and a slow client gets fewer, larger chunks. A
reader that keeps up need not even be woken: its sink takes each delta within the push.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from tinfer.api.service import Delta, Sink
from tinfer.errors import TinferError


class RequestStream:
    """Implements `api.service.Stream`."""

    def __init__(self, request_id: str, on_cancel: Callable[[str], None]) -> None:
        self._request_id = request_id
        self._on_cancel = on_cancel
        self._pending: Delta | None = None
        self._error: TinferError | None = None
        # Whether a finish reason or an error has been pushed, or the stream was cancelled; asked
        # for with every token, so no property.
        self.ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None

    @property
    def request_id(self) -> str:
        return self._request_id

    @property
    def failure(self) -> TinferError | None:
        """The error that it ended with."""
        return self._error

    # --- the dispatcher's side ----------------------------------------------------------------

    def push(self, delta: Delta) -> None:
        """Add what is new, and take ownership of it; a `finish_reason` ends the stream."""
        if self.ended:
            return
        if self._pending is None:
            if self._sink is not None and delta.finish_reason is None and self._sink(delta):
                return
            self._pending = delta
        else:
            merge(self._pending, delta)
        self.ended = delta.finish_reason is not None
        self._wake()

    def fail(self, error: TinferError) -> None:
        """End the stream with an error, after what is already pending."""
        if self.ended:
            return
        self._error = error
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- the client's side --------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            if self._pending is not None:
                delta, self._pending = self._pending, None
                yield delta
            elif self._error is not None:
                raise self._error
            elif self.ended:
                return
            else:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None

    def write_through(self, sink: Sink) -> None:
        self._sink = sink

    def cancel(self) -> None:
        if self.ended:
            return
        self.ended = True
        self._pending = None
        self._wake()
        self._on_cancel(self._request_id)


def merge(pending: Delta, new: Delta) -> None:
    """Add `new` to `pending` in place: a stalled reader must not make every step copy the past."""
    if pending.seams is None:
        pending.seams = []
    pending.seams.append((len(pending.text), len(pending.token_ids)))
    pending.text += new.text
    pending.token_ids.extend(new.token_ids)
    if pending.logprobs is None:
        pending.logprobs = new.logprobs
    elif new.logprobs is not None:
        pending.logprobs.extend(new.logprobs)
    pending.prompt_logprobs = pending.prompt_logprobs or new.prompt_logprobs
    pending.finish_reason = new.finish_reason
    pending.stop_reason = new.stop_reason
    pending.trace = new.trace
    pending.cached_tokens = max(pending.cached_tokens, new.cached_tokens)
