"""Server-sent events, from bytes as they come off the socket to the data of each event.

Follows the event stream format of the WHATWG HTML standard, section 9.2, as far as a client of
`/v1/*` needs it: `data` and `event`; comments, `id` and `retry` are read over. An event that has
not ended when the stream does is no event.
"""

from __future__ import annotations

from msgspec import Struct

MAX_EVENT_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


class SseEvent(Struct, frozen=True):
    """One event: its `data` lines joined by newlines, and its name."""

    data: str
    event: str = "message"


class EventTooLarge(ValueError):
    """One event has more than `MAX_EVENT_BYTES`."""


class SseParser:
    """Takes pieces cut anywhere, inside a line end or a UTF-8 character too."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._num_bytes = 0
        self._event = b""
        self._at_start = True
        # A line end may be CR LF, and its LF may be in the next piece.
        self._after_cr = False

    def feed(self, piece: bytes) -> list[SseEvent]:
        """The events that this piece completes. Raises `EventTooLarge`."""
        if not piece:
            return []
        if self._after_cr:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        text = self._rest + piece
        if self._at_start:
            if len(text) < len(_BOM) and _BOM.startswith(text):
                self._rest = text
                return []
            self._at_start = False
            text = text.removeprefix(_BOM)
        # Bytes split at CR, LF and CR LF only, none of which is ever part of a UTF-8 character.
        lines = text.splitlines(keepends=True)
        self._rest = b""
        if lines and not lines[-1].endswith((b"\r", b"\n")):
            self._rest = lines.pop()
        self._after_cr = text.endswith(b"\r")
        events = [event for line in lines if (event := self._line(line.rstrip(b"\r\n")))]
        if self._num_bytes + len(self._rest) > self._max_event_bytes:
            raise EventTooLarge(f"an event of more than {self._max_event_bytes} bytes")
        return events

    def _line(self, line: bytes) -> SseEvent | None:
        if not line:
            return self._end()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._num_bytes += len(value) + 1
        elif name == b"event":
            self._event = value
        return None

    def _end(self) -> SseEvent | None:
        data, name = self._data, self._event
        self._data, self._event, self._num_bytes = [], b"", 0
        if not data:
            return None
        text = b"\n".join(data).decode(errors="replace")
        return SseEvent(text, name.decode(errors="replace") or "message")
