"""Shares requests out among the servers of one arm, within the load generator's own process.

The replicas' balancer: each request goes to the server with the least outstanding work, in tokens
that are still to be computed, known exactly at every moment (a prompt counts until its first
token, an answer by what has not come yet). It costs the baseline no process and no hop, and knows
lengths that no real balancer does: what a comparison with it says of tinfer is on the safe side.
Arms of one server go through it too, so the client's cost is the same in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, cast

import aiohttp

from tinfer.bench.outcome import Planned

_EVENT = b"data: "


class Balancer:
    """Stands in for the session of a `Sender`; `placed` says which server each request went to.

    The sender's URL is the path alone. Requests are told apart by the body that the plan holds.
    """

    def __init__(
        self, session: aiohttp.ClientSession, urls: Sequence[str], plan: Iterable[Planned]
    ) -> None:
        self.placed: dict[str, int] = {}
        self.outstanding_tokens = [0] * len(urls)
        self._session = session
        self._urls = urls
        self._planned = {id(one.body): one for one in plan}

    def as_session(self) -> aiohttp.ClientSession:
        """The part of a session that a sender uses."""
        return cast(aiohttp.ClientSession, self)

    def post(self, path: str, *, data: bytes, **options: Any) -> _Exchange:
        """As `ClientSession.post`, to the server with the least outstanding tokens."""
        planned = self._planned[id(data)]
        place = min(range(len(self._urls)), key=self.outstanding_tokens.__getitem__)
        self.placed[planned.request_id] = place
        request = self._session.post(self._urls[place] + path, data=data, **options)
        return _Exchange(request, planned, self.outstanding_tokens, place)


class _Exchange:
    """One request under way: a context manager, as the session's own, and the response in one."""

    def __init__(
        self,
        request: Any,
        planned: Planned,
        outstanding_tokens: list[int],
        place: int,
    ) -> None:
        self._request = request
        self._outstanding_tokens = outstanding_tokens
        self._place = place
        self._prompt_tokens = planned.prompt_tokens
        self._left_tokens = planned.prompt_tokens + planned.output_tokens
        outstanding_tokens[place] += self._left_tokens

    async def __aenter__(self) -> _Exchange:
        try:
            self._response: aiohttp.ClientResponse = await self._request.__aenter__()
        except BaseException:
            self._done(self._left_tokens)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done(self._left_tokens)
        await self._request.__aexit__(kind, error, traceback)

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def reason(self) -> str | None:
        return self._response.reason

    @property
    def content(self) -> _Exchange:
        """The stream of the answer, of which it counts the events."""
        return self

    async def read(self, num_bytes: int) -> bytes:
        return await self._response.content.read(num_bytes)

    async def readany(self) -> bytes:
        piece = await self._response.content.readany()
        num_events = piece.count(_EVENT)
        if num_events and self._prompt_tokens:
            num_events += self._prompt_tokens
            self._prompt_tokens = 0
        self._done(min(num_events, self._left_tokens))
        return piece

    def _done(self, num_tokens: int) -> None:
        self._left_tokens -= num_tokens
        self._outstanding_tokens[self._place] -= num_tokens
