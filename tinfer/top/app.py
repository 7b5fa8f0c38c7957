"""`tinfer top` from its options to what is shown: ask the server, again and again or twice."""

from __future__ import annotations

import asyncio
import time

from msgspec import Struct
from rich.console import Console

from tinfer.client import (
    ApiError,
    AsyncClient,
    ConnectionFailed,
    NotFound,
    RequestTimeout,
    TinferClientError,
)
from tinfer.errors import StartError
from tinfer.top.compare import view_of
from tinfer.top.drawing import Picture
from tinfer.top.scrape import Scrape, scrape_of
from tinfer.top.screen import Screen
from tinfer.top.view import Sight, View

# A server that has not answered by then is as good as gone; it may come back.
ANSWER_TIMEOUT_S = 5.0


class TopOptions(Struct, frozen=True, kw_only=True):
    """What the command line says."""

    url: str
    api_key: str | None
    interval_s: float
    num_waiting: int


class Lost(Exception):
    """The server cannot be asked now, and may come back; `str` is one line for a person."""


class Watch:
    """The scrapes of one server, of which the last two are compared. Times are of one clock."""

    def __init__(self, url: str, num_waiting: int) -> None:
        self._url = url
        self._num_waiting = num_waiting
        self._last: Scrape | None = None
        self.sight = Sight(url=url, view=None)

    def saw(self, scrape: Scrape) -> View:
        """The server has answered."""
        view = view_of(self._url, self._last, scrape, self._num_waiting)
        self._last = scrape
        self.sight = Sight(url=self._url, view=view)
        return view

    def lost(self, why: str, now_s: float) -> None:
        """It has not; what was seen last stays."""
        lost_s = None if self._last is None else now_s - self._last.at_s
        self.sight = Sight(url=self._url, view=self.sight.view, trouble=why, lost_s=lost_s)


async def look(client: AsyncClient) -> Scrape:
    """Ask the server once. Raises `Lost` where it is worth trying on, `TinferClientError` and
    `StartError` where it is not."""
    try:
        state = await client.state()
        ledger = await client.ledger()
        metrics = await client.metrics()
    except NotFound as error:
        raise StartError(f"{client.base_url} is no tinfer server: {error}") from error
    except TinferClientError as error:
        if may_pass(error):
            raise Lost(error.message) from error
        raise
    return scrape_of(metrics, state, ledger, time.monotonic(), time.time())


def may_pass(error: TinferClientError) -> bool:
    """Whether the same question may be answered later."""
    if isinstance(error, ApiError):
        return error.status == 429 or error.status >= 500
    return isinstance(error, ConnectionFailed | RequestTimeout)


async def once(options: TopOptions) -> View:
    """Two scrapes, an interval apart. Raises as `look`."""
    watch = Watch(options.url, options.num_waiting)
    async with _client(options) as client:
        watch.saw(await look(client))
        await asyncio.sleep(options.interval_s)
        return watch.saw(await look(client))


async def live(options: TopOptions, console: Console) -> int:
    """Show the server until the user leaves; returns the exit code. Raises as `look`, but for
    `Lost`: then it says so and tries on."""
    with Screen(console) as screen:
        watching = asyncio.create_task(_watch(options, screen))
        leaving = asyncio.create_task(screen.left())
        try:
            done, _ = await asyncio.wait({watching, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            leaving.cancel()
            await asyncio.wait({watching, leaving})
    return watching.result() if watching in done else leaving.result()


async def _watch(options: TopOptions, screen: Screen) -> int:
    """Never returns; raises as `look`, but for `Lost`."""
    watch = Watch(options.url, options.num_waiting)
    async with _client(options) as client:
        while True:
            due_s = time.monotonic() + options.interval_s
            try:
                watch.saw(await look(client))
            except Lost as error:
                watch.lost(str(error), time.monotonic())
            screen.show(Picture(watch.sight, screen.hint))
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))


def _client(options: TopOptions) -> AsyncClient:
    """Raises `ValueError` for what is no address."""
    return AsyncClient(
        options.url, options.api_key, timeout_s=ANSWER_TIMEOUT_S, max_retries=0, max_connections=1
    )
