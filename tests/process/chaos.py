"""A server under load whose workers are killed at random, and the account of its answers."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.process.box import Server
from tests.process.load import Request, chat, client, completion, random_prompt, send
from tinfer.core.sampling import SamplingSpec
from tinfer.worker.fake_model import expected_answer

NUM_CLIENTS = 24
LONGEST_PROMPT = 150


@dataclass
class Tally:
    """How requests ended."""

    num_answered: int = 0
    num_cancelled: int = 0
    num_refused: int = 0

    @property
    def num_submitted(self) -> int:
        return self.num_answered + self.num_cancelled


class Chaos:
    """Clients that ask, leave and dawdle, and a killer of workers, all by one seed."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self._killed: set[tuple[str, int]] = set()
        self.tally = Tally()
        self._num_ended = 0
        self._ended = asyncio.Event()
        self._over = False

    async def run(self, num_kills: int) -> None:
        """Returns when that many workers were killed and every client has its answer."""
        async with client() as session, asyncio.TaskGroup() as tasks:
            for number in range(NUM_CLIENTS):
                rng = random.Random(f"{self._rng.random()}/{number}")
                tasks.create_task(self._client(session, rng))
            for _ in range(num_kills):
                await self._until_ended(self._num_ended + self._rng.randint(1, 25))
                await self._kill_one()
            self._over = True

    async def _until_ended(self, number: int) -> None:
        while self._num_ended < number:
            self._ended.clear()
            await self._ended.wait()

    # --- deaths -------------------------------------------------------------------------------

    async def _kill_one(self) -> None:
        """SIGKILL a worker that lives or starts, and was not killed in this life already."""
        while True:
            workers = (await self._server.state())["workers"]
            alive = [
                (worker["id"], worker["generation"], worker["pid"])
                for worker in workers
                if worker["state"] in ("ready", "starting")
                and worker["pid"]
                and (worker["id"], worker["generation"]) not in self._killed
            ]
            if alive:
                break
            await asyncio.sleep(0.01)
        worker_id, generation, pid = self._rng.choice(alive)
        self._killed.add((worker_id, generation))
        self.kills[worker_id] += 1
        os.kill(pid, signal.SIGKILL)

    # --- clients ------------------------------------------------------------------------------

    async def _client(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        while not self._over:
            request = self._random_request(rng)
            leave_after = rng.randint(1, 12) if rng.random() < 0.15 else None
            await send(
                session,
                self._server.url,
                request,
                leave_after if request.body["stream"] else None,
                dawdle_s=0.02 * rng.random() if rng.random() < 0.2 else 0.0,
            )
            self._judge(request)
            self._num_ended += 1
            self._ended.set()
            if request.status == 503:
                await asyncio.sleep(0.05)

    def _random_request(self, rng: random.Random) -> Request:
        body: dict[str, Any] = {
            "max_tokens": rng.randint(1, 40),
            "stream": rng.random() < 0.8,
        }
        if rng.random() < 0.5:
            body["seed"] = rng.randrange(100)
        if rng.random() < 0.2:
            return chat("".join(rng.choices("abc ", k=rng.randint(1, LONGEST_PROMPT))), **body)
        prompt = random_prompt(rng, LONGEST_PROMPT)
        if rng.random() < 0.3:
            spec = SamplingSpec(max_tokens=40, seed=body.get("seed"))
            text = expected_answer(prompt, spec, self._server.settings)[1]
            body["stop"] = [text[2:4] or "x", "never said"]
        return completion(prompt, **body)

    def _judge(self, request: Request) -> None:
        """Each request is answered as if nothing had happened, unless its client left, or came when
        no worker was up."""
        tally = self.tally
        if request.cancelled:
            tally.num_cancelled += 1
            request.check_so_far(self._server.settings)
        elif request.error is None:
            tally.num_answered += 1
            request.check_answered(self._server.settings)
        else:
            tally.num_refused += 1
            assert request.error["code"] == 503, request
            assert request.error["message"] == "no worker is up", request
            assert not request.choices[0].token_ids, request
