"""Requests to a server of the fake engine, what came back, and what should have."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tinfer.core.sampling import SamplingSpec
from tinfer.worker.fake_model import expected_answer
from tinfer.worker.fake_settings import FakeSettings

# Fields of a request body that are also fields of the spec which the worker gets.
_SAMPLED = ("seed", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "max_tokens")
_SHOWN = ("include_stop_str_in_output", "skip_special_tokens")

Expected = tuple[list[int], str, str, int | str | None]


def fake_flags(fake: Mapping[str, float], **options: object) -> list[str]:
    """Command line of a server of the fake engine; options by their config names."""
    flags = ["--engine", "fake"]
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    for name, number in fake.items():
        flags += ["--fake-engine", f"{name}={number}"]
    return flags


@dataclass
class Choice:
    """One answer as far as it came."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None
    num_logprobs: int = 0

    @property
    def answer(self) -> tuple[list[int], str, str | None, int | str | None]:
        return self.token_ids, self.text, self.finish_reason, self.stop_reason


@dataclass
class Request:
    """One request and all that its client has seen of it."""

    path: str
    body: dict[str, Any]
    choices: list[Choice]
    status: int = 0
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    retry_after: str | None = None
    num_events: int = 0
    cancelled: bool = False
    done: bool = False

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("chat/completions")

    def see_body(self, body: dict[str, Any]) -> None:
        """A whole response."""
        for choice in body["choices"]:
            self._add(choice, body.get("prompt_token_ids"))
        self.usage = body["usage"]
        self.done = True

    def see_event(self, event: dict[str, Any]) -> None:
        """One event of a stream."""
        assert self.error is None and not self.done, "something after the end"
        self.num_events += 1
        if "error" in event:
            self.error = event["error"]
            return
        self.usage = event.get("usage", self.usage)
        for choice in event["choices"]:
            self._add(choice, event.get("prompt_token_ids"))

    def _add(self, said: dict[str, Any], prompt_token_ids: list[int] | None) -> None:
        choice = self.choices[said["index"]]
        assert choice.finish_reason is None, "something after the finish reason"
        text = said.get("text")
        if text is None:
            text = (said.get("delta") or said["message"])["content"]
        choice.text += text or ""
        choice.token_ids += said.get("token_ids") or []
        choice.finish_reason = said["finish_reason"]
        choice.stop_reason = said.get("stop_reason")
        choice.prompt_token_ids = (
            choice.prompt_token_ids or said.get("prompt_token_ids") or prompt_token_ids
        )
        logprobs = said.get("logprobs") or {}
        choice.num_logprobs += len(logprobs.get("content") or logprobs.get("tokens") or ())

    def expected(self, index: int, settings: FakeSettings) -> Expected:
        """What this choice should come to, by the prompt that the server says it has tokenised."""
        prompt = self.choices[index].prompt_token_ids
        assert prompt, self
        spec = SamplingSpec(**{n: self.body[n] for n in (*_SAMPLED, *_SHOWN) if n in self.body})
        child = index % self.body.get("n", 1)
        fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
        fields["max_tokens"] = min(spec.max_tokens, settings.longest - len(prompt))
        if spec.seed is not None:
            fields["seed"] = spec.seed + child
        return expected_answer(prompt, SamplingSpec(**fields), settings)

    def check_answered(self, settings: FakeSettings) -> None:
        """The request has its full and right answer."""
        assert (self.status, self.error, self.done) == (200, None, True), self
        for index, choice in enumerate(self.choices):
            assert choice.answer == self.expected(index, settings), self
            if "logprobs" in self.body:
                assert choice.num_logprobs == len(choice.token_ids), self
        if self.usage is not None:
            assert self.usage["completion_tokens"] == self.num_tokens, self

    @property
    def num_tokens(self) -> int:
        """Of all answers together, as far as they came."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def check_so_far(self, settings: FakeSettings) -> None:
        """What came is the head of the right answer."""
        for index, choice in enumerate(self.choices):
            if choice.prompt_token_ids is None:
                assert not choice.token_ids and not choice.text, self
                continue
            token_ids, text, *_ = self.expected(index, settings)
            assert token_ids[: len(choice.token_ids)] == choice.token_ids, self
            assert text.startswith(choice.text), self


def completion(prompt: Any, num_choices: int = 1, **body: Any) -> Request:
    """A streamed completion unless `body` says otherwise."""
    defaults = {"prompt": prompt, "stream": True, "return_token_ids": True, "max_tokens": 16}
    return Request("/v1/completions", {**defaults, **body}, [Choice() for _ in range(num_choices)])


def chat(text: str, num_choices: int = 1, **body: Any) -> Request:
    """A streamed chat unless `body` says otherwise."""
    messages = [{"role": "user", "content": text}]
    defaults = {"messages": messages, "stream": True, "return_token_ids": True, "max_tokens": 16}
    return Request(
        "/v1/chat/completions", {**defaults, **body}, [Choice() for _ in range(num_choices)]
    )


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(1, 256) for _ in range(rng.randint(1, longest))]


def random_request(rng: random.Random, longest: int, settings: FakeSettings) -> Request:
    """Any shape: endpoint, streamed or not, one or several prompts and answers, how it ends."""
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 48), "stream": rng.random() < 0.7}
    if rng.random() < 0.5:
        body["seed"] = rng.randrange(1000)
    if rng.random() < 0.2:
        body["ignore_eos"] = True
    if rng.random() < 0.2:
        body["min_tokens"] = min(4, body["max_tokens"])
    if rng.random() < 0.15:
        body["stop_token_ids"] = [rng.randrange(settings.vocab_size) for _ in range(40)]
    if rng.random() < 0.2:
        body["n"] = rng.randint(2, 3)
    n = body.get("n", 1)
    kind = rng.random()
    if kind < 0.25:
        body |= {"logprobs": True, "top_logprobs": 2} if rng.random() < 0.3 else {}
        return chat("".join(rng.choices("abc déf", k=rng.randint(1, longest))), n, **body)
    if rng.random() < 0.15:
        body["logprobs"] = rng.randint(0, 3)
    if kind < 0.4:
        return completion("".join(rng.choices("xyz üß", k=rng.randint(1, longest))), n, **body)
    if kind < 0.5:
        prompts = [random_prompt(rng, longest // 2) for _ in range(rng.randint(1, 3))]
        return completion(prompts, n * len(prompts), **body)
    prompt = random_prompt(rng, longest)
    if rng.random() < 0.4:
        body["stop"] = random_stops(rng, prompt, body, settings)
        body["include_stop_str_in_output"] = rng.random() < 0.5
    return completion(prompt, n, **body)


def random_stops(
    rng: random.Random, prompt: list[int], body: dict[str, Any], settings: FakeSettings
) -> list[str]:
    """Stop strings of which one is in the answer, at its head as often as not."""
    spec = SamplingSpec(max_tokens=body["max_tokens"], seed=body.get("seed"))
    text = expected_answer(prompt, spec, settings)[1] or "none"
    start = rng.randrange(min(4, len(text))) if rng.random() < 0.5 else rng.randrange(len(text))
    return [text[start : start + rng.randint(1, 5)], "never said"]


async def send(
    session: aiohttp.ClientSession,
    url: str,
    request: Request,
    leave_after: int | None = None,
    dawdle_s: float = 0.0,
) -> Request:
    """Run a request to its end, or leave after so many events; dawdle after each of them."""
    async with session.post(url + request.path, json=request.body) as response:
        request.status = response.status
        request.retry_after = response.headers.get("Retry-After")
        if response.status != 200:
            request.error = (await response.json())["error"]
        elif not request.body["stream"]:
            request.see_body(await response.json())
        else:
            async for event in _events(response, request):
                request.see_event(event)
                if request.num_events == leave_after:
                    request.cancelled = True
                    response.close()
                    break
                if dawdle_s:
                    await asyncio.sleep(dawdle_s)
    return request


async def _events(
    response: aiohttp.ClientResponse, request: Request
) -> AsyncIterator[dict[str, Any]]:
    """Every JSON event; `[DONE]` has to be there, and has to be the last."""
    async for line in response.content:
        if not line.startswith(b"data: "):
            assert line == b"\n", line
        elif line == b"data: [DONE]\n":
            request.done = True
            assert (await response.content.read()).strip() == b"", "something after [DONE]"
            return
        else:
            yield json.loads(line[6:])
    assert request.done, f"the stream ended without [DONE]: {request}"


def client(num_connections: int = 0) -> aiohttp.ClientSession:
    """A session of so many connections at a time; 0 is no bound."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=num_connections),
        timeout=aiohttp.ClientTimeout(total=50),
        read_bufsize=1 << 20,
    )
