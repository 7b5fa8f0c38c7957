"""Requests to the built-in model on real vLLM: a pool, each asked once while nothing is wrong.

In float32 every answer under chaos has to be what it was then. In bfloat16 a prompt that is
computed in other pieces rounds differently, and of two tokens that score nearly the same the other
one may win: there, each answer that differs is told with how far apart the two were.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.chaos_clients import Answer, Asked, asked, client, first_difference
from tests.process.load import Choice, send
from tinfer.tiny_model import files, tasks

NUM_TOP = 20
NUM_AT_ONCE = 3
LONGEST_PROMPT = 3000
LONGEST_ANSWER = 500
# What can be added to a log probability as it can to a score; `repetition_penalty` cannot.
ADDITIVE = {"presence_penalty": 0.8, "frequency_penalty": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0},
    "penalised": ADDITIVE,
    "grammar": {"structured_outputs": {"regex": "([a-z]{1,7} ){200}"}},
    "stop": {"stop": ["never said, and long enough to hold text back"]},
    "logprobs": {"logprobs": 2, "min_tokens": 8},
}


@dataclass
class Measured(Asked):
    """A request that asks for the likeliest tokens at every place; `tops` has their log
    probabilities by token id."""

    tops: list[dict[int, float]] = field(default_factory=list)

    def see_event(self, event: dict[str, Any]) -> None:
        super().see_event(event)
        for choice in event.get("choices", ()):
            told = (choice.get("logprobs") or {}).get("top_logprobs") or []
            self.tops += [_by_id(top) for top in told]


def _by_id(top: dict[str, float]) -> dict[int, float]:
    return {int(name.removeprefix("token_id:")): value for name, value in top.items()}


class PoolLoad:
    """Draws from the pool; `ask_all` has to have been called before."""

    def __init__(self, num_requests: int, seed: int) -> None:
        rng = random.Random(f"pool/{seed}")
        names = [name for name in KINDS for _ in range(2 if name == "greedy" else 1)]
        self.pool = [(name, _body(name, rng)) for name in _cycled(names, num_requests)]
        self.undisturbed: list[Measured] = []

    def draw(self, rng: random.Random) -> Asked:
        number = rng.randrange(len(self.pool))
        kind, body = self.pool[number]
        return asked("/v1/completions", body, kind, rng, number)

    def expected(self, asked: Asked, index: int) -> Answer:
        return self.undisturbed[asked.number].choices[index].answer

    async def ask_all(self, url: str) -> None:
        """Ask every request of the pool of a server that nothing happens to. Raises
        `AssertionError` for one that is not answered."""
        gate = asyncio.Semaphore(NUM_AT_ONCE)
        self.undisturbed = [_measured(kind, body) for kind, body in self.pool]
        async with client() as session:

            async def ask(one: Measured) -> None:
                async with gate:
                    await send(session, url, one)
                assert (one.status, one.error, one.done) == (200, None, True), one

            await asyncio.gather(*(ask(one) for one in self.undisturbed))

    def difference(self, one: Asked) -> dict[str, Any]:
        """Where an answer under chaos leaves the undisturbed one, and by how much the undisturbed
        token had won there, in nats: of log probability, less penalties, plus what a seeded draw
        adds. Null where the other token was not among the likeliest."""
        calm = self.undisturbed[one.number]
        right, found = calm.choices[0].token_ids, one.choices[0].token_ids
        at = first_difference(found, right)
        row: dict[str, Any] = {"kind": one.kind, "number": one.number, "at": at}
        row["margin_nats"] = None
        if at < min(len(found), len(right)):
            row |= {"token": found[at], "undisturbed_token": right[at]}
            margin = self._margin(calm, at, right[at], found[at])
            row["margin_nats"] = None if margin is None else round(margin, 5)
        return row

    def _margin(self, calm: Measured, at: int, token: int, other: int) -> float | None:
        top, body = calm.tops[at], calm.body
        if token not in top or other not in top:
            return None
        said = Counter(calm.choices[0].token_ids[:at])
        lead = top[token] - _penalty(body, said[token]) - top[other] + _penalty(body, said[other])
        if "seed" not in body:
            return lead
        from benchmarks.chaos_noise import noise_lead  # torch, where nothing else needs it

        return lead + noise_lead(body["seed"], at, token, other)


def _penalty(body: dict[str, Any], num_said: int) -> float:
    """What a token loses that the answer already has so often."""
    frequency = float(body.get("frequency_penalty", 0.0)) * num_said
    return frequency + (float(body.get("presence_penalty", 0.0)) if num_said else 0.0)


def _cycled(names: Sequence[str], number: int) -> list[str]:
    return [names[at % len(names)] for at in range(number)]


def _body(kind: str, rng: random.Random) -> dict[str, Any]:
    """A conversation of some length that ends in a task with a long answer."""
    wanted = round(100 * (LONGEST_PROMPT / 100) ** rng.random())
    prompt: list[int] = []
    while len(prompt) < wanted:
        example = tasks.draw(rng)
        prompt += files.encode_turn("user", example.prompt)
        prompt += files.encode_turn("assistant", example.answer)
    first, last = rng.randint(0, 100), rng.randint(180, tasks.MAX_NUMBER)
    prompt += files.encode_turn("user", f"Count from {first} to {last}.")
    body = {
        "prompt": [*prompt, files.SPECIAL_IDS["<|assistant|>"]],
        "max_tokens": round(16 * (LONGEST_ANSWER / 16) ** rng.random()),
        "ignore_eos": True,
        "temperature": 0.0,
        **KINDS[kind],
    }
    return body | ({"seed": rng.randrange(1000)} if kind == "seeded" else {})


def _measured(kind: str, body: dict[str, Any]) -> Measured:
    more = {"logprobs": NUM_TOP, "return_tokens_as_token_ids": True, "return_token_ids": True}
    body = {**body, **more, "stream": True}
    return Measured("/v1/completions", body, [Choice()], kind=kind)


async def worst_margins(url: str, answers: Sequence[Asked]) -> list[float]:
    """Of each greedy answer, by how many nats at most one of its tokens was beaten, when the model
    is given the prompt and all tokens of the answer before it: 0 where each was the likeliest of
    what follows exactly the tokens that the client has."""
    async with client() as session:
        return [await _worst_margin(session, url, one) for one in answers]


async def _worst_margin(session: aiohttp.ClientSession, url: str, one: Asked) -> float:
    prompt = one.body["prompt"]
    body = {
        "prompt": prompt + one.choices[0].token_ids,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 1,
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        said = await response.json()
        assert response.status == 200, said
    margins = []
    places = said["choices"][0]["prompt_logprobs"][len(prompt) :]
    for token, place in zip(one.choices[0].token_ids, places, strict=True):
        best = max(entry["logprob"] for entry in place.values())
        margins.append(best - place[str(token)]["logprob"])
    return max(margins, default=0.0)
