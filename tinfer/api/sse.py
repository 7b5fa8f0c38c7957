"""Server-sent events: how chunks become bytes, and the response they are written to.

One write per batch of deltas, no timer. A write waits when the client is slow, which in turn leaves
the deltas in their stream, where they merge.
"""

from __future__ import annotations

import msgspec
from aiohttp import web
from msgspec import Struct

from tinfer.api.responses import ChunkHead, ChunkTail, ErrorBody

DONE = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()


class Framer:
    """Frames the chunks of one stream; what all of them share is encoded once."""

    def __init__(self, head: ChunkHead) -> None:
        self._start = b"data: " + _ENCODER.encode(head)[:-1] + b',"choices":['

    def chunk(self, choice: Struct | None, tail: ChunkTail | None = None) -> bytes:
        """One event with one choice, or with none."""
        shown = b"" if choice is None else _ENCODER.encode(choice)
        if tail is None:
            return b"%b%b]}\n\n" % (self._start, shown)
        more = _ENCODER.encode(tail)[1:]
        return b"%b%b]%b%b\n\n" % (self._start, shown, b"" if more == b"}" else b",", more)


def error_event(body: ErrorBody) -> bytes:
    """The event that ends a stream that fails midway."""
    return b"data: " + _ENCODER.encode(body) + b"\n\n"


async def open_stream(request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
    """Send the head of an event stream; `headers` are added to the usual ones."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            **headers,
        }
    )
    await response.prepare(request)
    return response
