"""Time limits of one request, each with its own name in the error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct

from tinfer.client.errors import Limit, RequestTimeout


class TimeLimits(Struct, frozen=True, kw_only=True):
    """Seconds; None is no limit.

    `connect_s`: until the connection stands, per attempt. `first_token_s`: of a stream, from the
    sending of an attempt to its first token. `token_gap_s`: of a stream, between two pieces of the
    answer. `total_s`: the whole request with all attempts and, of a stream, the caller's own time.
    """

    connect_s: float | None = 5.0
    first_token_s: float | None = None
    token_gap_s: float | None = None
    total_s: float | None = 600.0


class Deadlines:
    """When each limit of one request passes, on the running loop's clock."""

    def __init__(self, limits: TimeLimits) -> None:
        self._limits = limits
        self._at_s: dict[Limit, float] = {}
        self.start("total", limits.total_s)

    def start(self, limit: Limit, seconds: float | None) -> None:
        """This limit passes `seconds` from now; None removes it."""
        self._at_s.pop(limit, None)
        if seconds is not None:
            self._at_s[limit] = asyncio.get_running_loop().time() + seconds

    def await_first_token(self) -> None:
        self.start("first token", self._limits.first_token_s)

    def await_next_token(self) -> None:
        self._at_s.pop("first token", None)
        self.start("between tokens", self._limits.token_gap_s)

    def leaves(self, seconds: float) -> bool:
        """Whether so many seconds from now are still within the total limit."""
        at_s = self._at_s.get("total")
        return at_s is None or asyncio.get_running_loop().time() + seconds < at_s

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Cancel the block at whichever limit passes first. Raises `RequestTimeout`."""
        limit = min(self._at_s, key=self._at_s.__getitem__, default=None)
        scope = asyncio.timeout_at(None if limit is None else self._at_s[limit])
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if limit is None or not scope.expired():
                raise
            raise RequestTimeout(limit) from error
