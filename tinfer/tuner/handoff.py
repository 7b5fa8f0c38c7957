"""Measures hand-offs as they are in a server: a prompt is computed on one worker, another one is
ordered to go on from it, pulls the KV blocks, and says when they are installed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tinfer.errors import StartError
from tinfer.tune.points import HandoffPoint
from tinfer.tuner.driver import Received, Workers, fixed_length, random_prompt
from tinfer.tuner.rounds import Progress, rounds
from tinfer.wire import messages as wire


class Handoff(NamedTuple):
    """One hand-off; see `HandoffPoint`."""

    elapsed_s: float
    copy_s: float
    num_bytes: int


async def handoffs(
    driver: HandoffDriver, sizes: Sequence[int], repeats: int, progress: Progress
) -> list[HandoffPoint]:
    """A point per prompt length. The first hand-off, in which the reader maps the owner's memory,
    is not counted."""
    progress.stage("first hand-off", 1)
    await driver.hand_off(sizes[0])
    progress.visited()

    async def visit(tokens: int) -> list[Handoff]:
        return [await driver.hand_off(tokens)]

    found = await rounds(progress, "hand-off", sizes, visit, repeats)
    return [
        HandoffPoint(
            tokens=tokens,
            num_bytes=some[0].num_bytes,
            samples_s=tuple(one.elapsed_s for one in some),
            copy_samples_s=tuple(one.copy_s for one in some),
        )
        for tokens, some in found.items()
    ]


class HandoffDriver:
    """Sends one request after the other through both workers."""

    def __init__(self, workers: Workers, owner: str, reader: str, rng: random.Random) -> None:
        self._workers = workers
        self._owner = owner
        self._reader = reader
        self._rng = rng
        self._num_started = 0

    async def hand_off(self, tokens: int) -> Handoff:
        """Returns when both workers are done with it. Raises `StartError` if the reader could not
        get the blocks."""
        self._num_started += 1
        request_id = f"handoff/{self._num_started}"
        prompt = random_prompt(tokens, self._workers.ready[self._owner].vocab_size, self._rng)
        prefill = wire.Start(request_id, "prefill", prompt, fixed_length(2))
        self._workers.send(self._owner, prefill)
        first = await self._prefilled()
        first_token = first.token_ids[0].to_bytes(4, "little")
        decode = msgspec.structs.replace(
            prefill, kind="decode", source=first.source, forced_tokens=first_token
        )
        ordered_s = self._workers.moment(self._reader).at_s
        self._workers.send(self._reader, decode)
        at_s, done = await self._ends()
        if not done.ok:
            raise StartError(f"the hand-off failed: {done.reason}")
        # With what the reader waited for its core: it also waits while its own thread copies.
        return Handoff(at_s - ordered_s, done.copy_s, done.num_bytes)

    async def _prefilled(self) -> wire.Output:
        """The output, which says where the blocks are held."""
        while True:
            message = (await self._receive()).message
            for output in message.outputs if isinstance(message, wire.Step) else []:
                if output.source is None:
                    raise StartError(f"the prefill ended by {output.finish_reason}, without blocks")
                return output

    async def _ends(self) -> tuple[float, wire.PullDone]:
        """When the news of the pull came, and the news; the order of the three ends is open."""
        pulled: tuple[float, wire.PullDone] | None = None
        is_answered = is_released = False
        while not (pulled and is_answered and is_released):
            moment, _, message = await self._receive()
            match message:
                case wire.PullDone():
                    pulled = moment.at_s, message
                case wire.Step(outputs=outputs):
                    is_answered |= any(one.finish_reason is not None for one in outputs)
                case wire.LeasesEnded():
                    is_released = True
        return pulled

    async def _receive(self) -> Received:
        received = await self._workers.receive()
        if isinstance(received.message, wire.Refused):
            raise StartError(f"the engine refused a measurement: {received.message.message}")
        return received
