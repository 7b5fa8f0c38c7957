"""Requests that may end badly: what a client saw, up to the end or the error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.e2e.serving import get_json

STATE_DEADLINE_S = 120.0
State = dict[str, Any]


@dataclass
class Outcome:
    """`status` 0 means that no head of a response came; `ended` that the response was complete."""

    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    ended: bool = False

    @property
    def answer(self) -> tuple[str, list[int], str | None]:
        return self.text, self.token_ids, self.finish_reason

    def take(self, event: dict[str, Any]) -> None:
        """Add what one SSE event or one whole body says."""
        self.error = event.get("error", self.error)
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            self.token_ids += choice["token_ids"] or []
            self.finish_reason = choice["finish_reason"] or self.finish_reason


class Follower:
    """One completion, running as a task of its own. `await` it for the outcome."""

    def __init__(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
        self.outcome = Outcome()
        self.first_token = asyncio.Event()
        self._changed = asyncio.Event()
        defaults = {"model": "tiny", "temperature": 0.0, "return_token_ids": True, "stream": True}
        self._body = {**defaults, **body}
        self.task = asyncio.create_task(self._run(session, f"{url}/v1/completions"))

    def __await__(self) -> Any:
        return self.task.__await__()

    async def progress(self) -> None:
        """Return when something has come since the last call, the end included."""
        await self._changed.wait()
        self._changed.clear()

    async def leave(self) -> None:
        """Hang up, if it is not over yet."""
        self.task.cancel()
        await asyncio.wait({self.task})

    async def _run(self, session: aiohttp.ClientSession, url: str) -> Outcome:
        try:
            return await self._read(session, url)
        finally:
            self._changed.set()

    async def _read(self, session: aiohttp.ClientSession, url: str) -> Outcome:
        outcome = self.outcome
        async with session.post(url, json=self._body) as response:
            outcome.status = response.status
            if response.content_type != "text/event-stream":
                outcome.take(await response.json())
                outcome.ended = True
                return outcome
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    outcome.ended = True
                elif line.startswith(b"data: "):
                    outcome.take(json.loads(line[6:]))
                    self._changed.set()
                    if outcome.token_ids:
                        self.first_token.set()
        return outcome


def client_session() -> aiohttp.ClientSession:
    """No limit on connections; what hangs is for the test's own time limit to say."""
    timeout = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def until_state(url: str, holds: Callable[[State], bool]) -> State:
    """The first `/debug/state` of which `holds` is true; fails with the last one otherwise."""
    deadline = time.monotonic() + STATE_DEADLINE_S
    while True:
        state = await get_json(f"{url}/debug/state")
        if holds(state):
            return state
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.01)


def worker(state: State, worker_id: str) -> dict[str, Any]:
    found: dict[str, Any] = next(w for w in state["workers"] if w["id"] == worker_id)
    return found


def all_ready(state: State) -> bool:
    return all(w["state"] == "ready" for w in state["workers"])
