"""Sends a plan on time, whatever the server does, and keeps what comes back: all I/O of a run.

Open loop: a request is sent when it is due, however many have not been answered, so a slow server
cannot slow its own load down. What may still hold a request back is told apart: the wait for a
place under `max_concurrency`, and the lag of this process.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import aiohttp
import msgspec

from tinfer.bench.outcome import LoadRun, Outcome, Planned
from tinfer.bench.stream import AnswerReader, BadStream
from tinfer.client.results import ErrorBody

# Source: the limit of vLLM 0.32's benchmark client.
REQUEST_TIMEOUT_S = 6 * 3600.0
MAX_ERROR_BYTES = 64 << 10
MAX_SHOWN_CHARS = 300


def open_session(headers: Mapping[str, str], max_concurrency: int | None) -> aiohttp.ClientSession:
    """Connections for one run, kept between requests; as many as there are requests at once."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_concurrency or 0, keepalive_timeout=60),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "tinfer-bench",
            **headers,
        },
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    )


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What is allocated by now is not looked through by the collector, which would pause sends."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Sender:
    """Sends plans to one URL over one session, which the caller closes.

    `on_end` is called as each request ends.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        max_concurrency: int | None = None,
        on_end: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self._session = session
        self._url = url
        self._max_concurrency = max_concurrency
        self._on_end = on_end

    async def run(self, plan: Sequence[Planned], stop: asyncio.Event | None = None) -> LoadRun:
        """Send every request of the plan; ends with the last answer, or soon after `stop` is set.

        Raises `ValueError` for a plan whose ids or `after` do not add up, before anything is sent.
        """
        run = _Run(self._session, self._url, plan, self._max_concurrency, self._on_end)
        cpu_s = time.process_time()
        sending = asyncio.create_task(run.all())
        stopping = asyncio.create_task((stop or asyncio.Event()).wait())
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            interrupted = not sending.done()
            for task in (stopping, sending):
                task.cancel()
            await asyncio.wait({sending, stopping})
        duration_s = run.now_s()
        if not sending.cancelled():
            sending.result()
        return LoadRun(
            outcomes=[
                run.outcomes[one.request_id] for one in plan if one.request_id in run.outcomes
            ],
            duration_s=duration_s,
            cpu_s=time.process_time() - cpu_s,
            interrupted=interrupted,
            num_not_sent=len(plan) - len(run.outcomes),
        )


class _Run:
    """The state of one run. `outcomes` holds what has been sent, by its id."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        plan: Sequence[Planned],
        max_concurrency: int | None,
        on_end: Callable[[Outcome], None],
    ) -> None:
        self._session = session
        self._url = url
        self._plan = sorted(plan, key=lambda one: one.planned_s)
        self._places = asyncio.Semaphore(max_concurrency or max(1, len(plan)))
        self._on_end = on_end
        ids = {one.request_id for one in plan}
        awaited = {one.after for one in plan if one.after is not None}
        if len(ids) < len(plan):
            raise ValueError("two requests of the plan have the same id")
        if awaited - ids:
            raise ValueError(f"a request is due after {min(awaited - ids)!r}, which is not planned")
        if _has_cycle({one.request_id: one.after for one in plan}):
            raise ValueError("some requests of the plan are due after each other")
        self._ended = {request_id: asyncio.Event() for request_id in awaited}
        self.outcomes: dict[str, Outcome] = {}
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for one in self._plan:
                # Timers have a resolution of a millisecond and may fire early.
                while (wait_s := one.planned_s - self.now_s()) > 0:  # noqa: ASYNC110, no polling
                    await asyncio.sleep(wait_s)
                group.create_task(self._one(one))

    async def _one(self, one: Planned) -> None:
        due_s = one.planned_s
        if one.after is not None:
            await self._ended[one.after].wait()
            due_s = max(due_s, self.outcomes[one.after].end_s)
        outcome = Outcome(
            request_id=one.request_id,
            due_s=due_s,
            prompt_tokens=one.prompt_tokens,
            asked_tokens=one.output_tokens,
        )
        asked_s = self.now_s()
        async with self._places:
            outcome.sent_s = self.now_s()
            outcome.queue_s = outcome.sent_s - asked_s
            self.outcomes[one.request_id] = outcome
            try:
                await self._exchange(one.body, outcome)
            except asyncio.CancelledError:
                outcome.interrupted = True
                raise
            finally:
                outcome.end_s = self.now_s()
        if one.request_id in self._ended:
            self._ended[one.request_id].set()
        self._on_end(outcome)

    async def _exchange(self, body: bytes, outcome: Outcome) -> None:
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False) as response:
                outcome.status = response.status
                if response.status != 200:
                    outcome.error = await _refusal(response)
                    return
                await self._read(response, outcome)
        except BadStream as error:
            outcome.error = str(error)
        except TimeoutError:
            outcome.error = f"no answer within {REQUEST_TIMEOUT_S:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            outcome.error = f"{type(error).__name__}: {error}".rstrip(": ")

    async def _read(self, response: aiohttp.ClientResponse, outcome: Outcome) -> None:
        reader = AnswerReader(outcome)
        while piece := await response.content.readany():
            reader.feed(piece, self.now_s())
        reader.close(self.now_s())


def _has_cycle(after: Mapping[str, str | None]) -> bool:
    """Whether following `after` from some request never ends."""
    ends: set[str] = set()
    for start in after:
        path: set[str] = set()
        at: str | None = start
        while at is not None and at not in ends:
            if at in path:
                return True
            path.add(at)
            at = after[at]
        ends |= path
    return False


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """The server's own words where it has some, else its status line."""
    told = await response.content.read(MAX_ERROR_BYTES)
    try:
        text = msgspec.json.decode(told, type=ErrorBody).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = told.decode(errors="replace")
    return " ".join(text.split())[:MAX_SHOWN_CHARS] or response.reason or "no reason given"
