"""Server-sent events: how chunks become bytes, and the response they are written to.

One write per batch of deltas, no timer. A write waits when the client is slow, which in turn leaves
the deltas in their stream, where they merge. To a client that keeps up, a delta is written as it
comes (`Direct`): waking the handler's task for it would cost more than all the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import HttpVersion11, web
from msgspec import Struct

from tinfer.api.responses import ChunkHead, ChunkTail, ErrorBody
from tinfer.api.service import Delta

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


class Chunked:
    """How a stream of chunks ends, for the replies that write one."""

    end_mark = DONE

    def failed(self, body: ErrorBody) -> bytes:
        """The event of a stream that fails midway."""
        return b"data: " + _ENCODER.encode(body) + b"\n\n"


def named_event(name: str, data: Struct) -> bytes:
    """One event of a stream whose events have names."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _ENCODER.encode(data))


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


class Direct:
    """Writes deltas to the connection of a stream whose head is written, from outside its handler.

    It takes a delta where the connection has sent all that it was given, and else leaves it: what
    waits is written, merged, by the handler, who can wait for the client. `encode` makes the bytes
    of the events, none where they say nothing; where it raises, the handler is left to find out and
    to say so.
    """

    def __init__(self, transport: asyncio.Transport, encode: Callable[[Delta], bytes]) -> None:
        self._transport = transport
        self._encode = encode

    def __call__(self, delta: Delta) -> bool:
        transport = self._transport
        if transport.get_write_buffer_size() or transport.is_closing():
            return False
        try:
            events = self._encode(delta)
        except Exception:  # noqa: BLE001 - the handler meets it again and tells the client
            return False
        if not events:  # an empty chunk would end the response
            return True
        # A chunk of the chunked transfer coding, RFC 9112 section 7.1.
        transport.write(b"%x\r\n%b\r\n" % (len(events), events))
        return True


def direct(request: web.Request, encode: Callable[[Delta], bytes]) -> Direct | None:
    """For a request whose stream is open; None for a client of HTTP/1.0, which takes no chunks."""
    transport = request.transport
    if transport is None or request.version < HttpVersion11:
        return None
    return Direct(transport, encode)
