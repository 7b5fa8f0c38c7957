"""Clients under chaos: what they ask, how they behave, when they read what, and what it should be.

Greedy, seeded, penalised, grammar-guided and stop-string requests, streamed or not; some clients
leave after a few events, some after a time, some read slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import aiohttp

from tests.process.load import Choice, Request, random_prompt, random_stops, send
from tinfer.api.trace import TRACE_HEADER
from tinfer.worker.fake_settings import FakeSettings

# In the fast form only what has none of these.
EXACT_FIELDS = (
    *("seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs"),
    *("structured_outputs", "min_tokens", "stop", "bad_words"),
)
PENALTIES = {"presence_penalty": 0.8, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
NEVER_SAID = "never said, and long enough to hold text back"
Verdict = Literal["right", "failed", "lost", "repeated", "changed", "text", "usage"]
# One answer: token ids, text, finish reason, stop reason.
Answer = tuple[list[int], str, str | None, int | str | None]


@dataclass
class Asked(Request):
    """A request, what kind it is, and when which part of its answer was read.

    `seen` has (seconds of the monotonic clock, tokens so far) of every event; `number` is its place
    in a pool of requests that are asked more than once.
    """

    kind: str = ""
    number: int = -1
    request_id: str | None = None
    seen: list[tuple[float, int]] = field(default_factory=list)
    is_slow: bool = False
    verdict: Verdict = "right"

    @property
    def form(self) -> Literal["exact", "fast"]:
        return "exact" if any(self.body.get(name) for name in EXACT_FIELDS) else "fast"

    def see_event(self, event: dict[str, Any]) -> None:
        super().see_event(event)
        self._identify(event)
        self.seen.append((time.monotonic(), self.num_tokens))

    def see_body(self, body: dict[str, Any]) -> None:
        super().see_body(body)
        self._identify(body)

    def _identify(self, said: dict[str, Any]) -> None:
        trace = said.get("tinfer")
        if trace is not None:  # of several answers the first one stands for all
            self.request_id = self.request_id or trace.get("request_id")


class Load(Protocol):
    """What is asked, and what the answer should be."""

    def draw(self, rng: random.Random) -> Asked: ...

    def expected(self, asked: Asked, index: int) -> Answer:
        """Of one choice, of which something has come."""
        ...


def judged(asked: Asked, load: Load) -> Verdict:
    """What is to be said of a request that was answered or that its client left."""
    if not asked.cancelled and (asked.status, asked.error, asked.done) != (200, None, True):
        return "failed"
    for index, choice in enumerate(asked.choices):
        if asked.cancelled and choice.prompt_token_ids is None:
            continue
        verdict = compared(choice, load.expected(asked, index), asked.cancelled)
        if verdict != "right":
            return verdict
    if asked.usage is not None and asked.usage["completion_tokens"] != asked.num_tokens:
        return "usage"
    return "right"


def compared(choice: Choice, answer: Answer, is_cut: bool) -> Verdict:
    """One answer beside the right one, or beside its head where the client left."""
    found, (right, text, *_) = choice.token_ids, answer
    same = first_difference(found, right)
    if same < len(found):
        tail = found[same:]
        again = any(right[same - back :][: len(tail)] == tail for back in range(1, same + 1))
        return "repeated" if again else "changed"
    if is_cut:
        return "right" if text.startswith(choice.text) else "text"
    if same < len(right):
        return "lost"
    return "right" if choice.answer == answer else "text"


def first_difference(found: Sequence[int], right: Sequence[int]) -> int:
    """The number of leading tokens that are equal."""
    pairs = zip(found, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(found), len(right)))


class FakeLoad:
    """Requests to the fake engine, whose every token is a function of those before it."""

    def __init__(self, settings: FakeSettings, longest_prompt: int, longest_answer: int) -> None:
        self._settings = settings
        self._longest_prompt = longest_prompt
        self._longest_answer = longest_answer

    def draw(self, rng: random.Random) -> Asked:
        kind = rng.choice(("greedy", "greedy", "seeded", "penalised", "stop", "logprobs", "chat"))
        # As many short answers as long ones, by their logarithm.
        body: dict[str, Any] = {
            "max_tokens": round(self._longest_answer ** rng.random()),
            "ignore_eos": rng.random() < 0.5,
        }
        if rng.random() < 0.1:
            body["n"] = 2
        prompt = random_prompt(rng, self._longest_prompt)
        if kind == "chat":
            text = "".join(rng.choices("abc déf", k=len(prompt)))
            return asked("/v1/chat/completions", {"messages": _said(text), **body}, kind, rng)
        if kind == "seeded":
            body["seed"] = rng.randrange(1000)
        elif kind == "penalised":
            body |= PENALTIES
        elif kind == "stop":
            body["stop"] = [*random_stops(rng, prompt, body, self._settings), NEVER_SAID]
        elif kind == "logprobs":
            body |= {"logprobs": 2, "min_tokens": min(4, body["max_tokens"])}
        return asked("/v1/completions", {"prompt": prompt, **body}, kind, rng)

    def expected(self, asked: Asked, index: int) -> Answer:
        return asked.expected(index, self._settings)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def asked(
    path: str, body: dict[str, Any], kind: str, rng: random.Random, number: int = -1
) -> Asked:
    """The request, streamed four times of five, with token ids and usage."""
    body = {**body, "return_token_ids": True, "stream": rng.random() < 0.8}
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    choices = [Choice() for _ in range(body.get("n", 1))]
    return Asked(path, body, choices, kind=kind, number=number)


def client() -> aiohttp.ClientSession:
    """As many connections as are asked for; every answer tells its request's id."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=1 << 20,
        headers={TRACE_HEADER: "1"},
    )


async def behave(session: aiohttp.ClientSession, url: str, one: Asked, rng: random.Random) -> None:
    """Ask as one of several clients: most read to the end, some leave, some are slow."""
    draw = rng.random()
    is_streamed = bool(one.body["stream"])
    leave_after = rng.randint(1, 40) if draw < 0.1 and is_streamed else None
    deadline_s = rng.uniform(0.05, 2.0) if 0.1 <= draw < 0.2 else None
    dawdle_s = 0.02 * rng.random() if 0.2 <= draw < 0.3 and is_streamed else 0.0
    one.is_slow = dawdle_s > 0.0
    try:
        async with asyncio.timeout(deadline_s):
            await send(session, url, one, leave_after, dawdle_s)
    except TimeoutError:
        one.cancelled = True
    except (aiohttp.ClientError, AssertionError) as error:  # cut off, or events that cannot be
        one.error = {"code": 0, "message": f"{type(error).__name__}: {error}"}


class Crowd:
    """So many clients that ask one request after the other until they are told to stop.

    A request is refused only where no worker is up; then its client waits a moment. `on_end` gets
    every other one as it ends.
    """

    def __init__(
        self,
        url: str,
        load: Load,
        num_clients: int,
        seed: int,
        on_end: Callable[[Asked], None],
    ) -> None:
        self._url = url
        self._load = load
        self._on_end = on_end
        self._rngs = [random.Random(f"client/{seed}/{n}") for n in range(num_clients)]
        self._over = asyncio.Event()
        self.num_refused = 0

    async def run(self) -> None:
        """Returns once every client has its last answer after `stop`."""
        async with client() as session, asyncio.TaskGroup() as tasks:
            for rng in self._rngs:
                tasks.create_task(self._one(session, rng))

    def stop(self) -> None:
        self._over.set()

    async def _one(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        while not self._over.is_set():
            one = self._load.draw(rng)
            await behave(session, self._url, one, rng)
            if one.status == 503 and not one.num_tokens:
                self.num_refused += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), 0.1)
            else:
                self._on_end(one)
