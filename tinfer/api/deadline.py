"""How long a request may take: the server's limit, and a shorter one of the client's own."""

from __future__ import annotations

import asyncio
import math

from aiohttp import web

from tinfer.errors import DeadlinePassed, InvalidRequest

HEADER = "X-Request-Timeout"


class Deadline:
    """When an answer has to be complete; `seconds` None is never. Made on the running loop."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._at_s = None if seconds is None else asyncio.get_running_loop().time() + seconds

    def scope(self) -> asyncio.Timeout:
        """Ends the `async with` block with `TimeoutError` when the deadline passes."""
        return asyncio.timeout_at(self._at_s)

    def passed(self) -> DeadlinePassed:
        """The error for whoever has waited."""
        return DeadlinePassed(f"the answer was not complete after {self._seconds:g} s")


def shortest(*limits_s: float | None) -> float | None:
    """The one that passes first; None where there is none."""
    return min((one for one in limits_s if one is not None), default=None)


def header_seconds(request: web.Request) -> float | None:
    """The client's own limit. Raises `InvalidRequest` for a header that is no time."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    try:
        own_s = float(text)
    except ValueError:
        own_s = math.nan
    if not 0 < own_s < math.inf:
        raise InvalidRequest(f"{HEADER} takes seconds, got {text[:40]!r}")
    return own_s
