"""Measures from the first server's start to the last one's end: all I/O of a run.

Servers have the box to themselves: each is started, measured and ended before the next one comes,
in another order in each repetition. What warms a server up is not counted.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import aiohttp
import msgspec

from tinfer.bench.compare.options import VLLM_COMMAND
from tinfer.bench.compare.servers import Server
from tinfer.bench.compare.vllm_command import with_metadata
from tinfer.bench.frontend.arms import Mode, modes_of, server_of
from tinfer.bench.frontend.clocks import Part, parts_of, used
from tinfer.bench.frontend.options import VLLM, FrontendOptions, Kind
from tinfer.bench.frontend.points import (
    Measured,
    Point,
    first_failure,
    long_plan_of,
    measured_of,
    plan_of,
    points_of,
)
from tinfer.bench.interruption import Interrupted, unless_stopped
from tinfer.bench.outcome import LoadRun, Planned
from tinfer.bench.sender import Sender, frozen_heap, open_session
from tinfer.errors import StartError

_ENDPOINT = "/v1/completions"
_WARM_UP = Point(what="tokens", mode="full", streams=8, num_requests=16, output_tokens=16)
_SETTLE_S = 0.2


class Session:
    """One measurement of all arms; `measured` grows as it goes on."""

    def __init__(
        self,
        options: FrontendOptions,
        scratch: Path,
        stop: asyncio.Event,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._log_dir = options.log_dir or scratch
        self._stop = stop
        self._say = say
        self.measured: list[Measured] = []
        self._environment: Mapping[str, str] = (
            {"VLLM_LOGGING_LEVEL": "WARNING"} | dict(os.environ) | {"TMPDIR": str(scratch)}
        )
        if options.vllm_command == VLLM_COMMAND and set(options.arms) & set(VLLM):
            self._environment = with_metadata(self._environment, scratch / "metadata")

    async def all(self) -> None:
        """Every arm in every repetition. Raises `StartError`, and `Interrupted` after Ctrl-C."""
        rng = random.Random(f"tinfer bench frontend order {self._options.seed}")
        for repetition in range(self._options.repetitions):
            arms = list(self._options.arms)
            rng.shuffle(arms)
            for kind in arms:
                for mode in modes_of(kind):
                    await self._serve(kind, mode, repetition)

    async def _serve(self, kind: Kind, mode: Mode, repetition: int) -> None:
        self._say(f"repetition {repetition + 1}: {kind}, {mode}")
        log = self._log_dir / f"{kind}-{mode}-{repetition}.log"
        server = Server(server_of(kind, mode, self._options), self._environment, log)
        try:
            waiting = server.wait_ready(time.monotonic() + self._options.start_timeout_s)
            await unless_stopped(waiting, self._stop)
            parts = parts_of(server.front_pid, server.family())
            await self._send(server.url, plan_of(_WARM_UP, -1 - repetition), _WARM_UP.streams)
            for point in points_of(kind, mode, self._options):
                one = await self._point(server, parts, kind, point, repetition)
                self.measured.append(one)
                self._say(
                    f"  {point.what} x{point.streams}: {one.num_tokens / one.duration_s:.0f} "
                    f"tokens/s, front {1e6 * one.front_s / one.num_tokens:.1f} us per token"
                )
        finally:
            await asyncio.to_thread(server.stop)

    async def _point(
        self,
        server: Server,
        parts: Mapping[int, Part],
        kind: Kind,
        point: Point,
        repetition: int,
    ) -> Measured:
        plan = plan_of(point, self._options.seed + repetition)
        long_plan = long_plan_of(point, self._options.seed + repetition)
        await asyncio.sleep(_SETTLE_S)
        lags = await _lag_counts(server.url) if point.num_long else None
        try:
            with frozen_heap():
                before = used(parts)
                runs = await asyncio.gather(
                    self._send(server.url, plan, point.streams),
                    self._send(server.url, long_plan, None),
                )
                after = used(parts)
        except OSError as error:
            raise StartError(f"{kind}: a process of the server has ended") from error
        failure = first_failure([one for run in runs for one in run.outcomes])
        if failure is not None:
            raise StartError(f"{kind}, {point.what} x{point.streams}: {failure}")
        longest_ms = None
        if lags is not None:
            longest_ms = longest_lag_ms(lags, await _lag_counts(server.url))
        return measured_of(kind, point, repetition, runs[0], after.since(before), longest_ms)

    async def _send(self, url: str, plan: list[Planned], max_concurrency: int | None) -> LoadRun:
        async with open_session({}, max_concurrency) as session:
            run = await Sender(session, url + _ENDPOINT, max_concurrency).run(plan, self._stop)
        if run.interrupted:
            raise Interrupted
        return run


class LoopLag(msgspec.Struct):
    """What `/debug/state` says of it: turns by how late they were, see tinfer/master/lag.py."""

    bounds_s: list[float]
    counts: list[int]


class _State(msgspec.Struct):
    loop_lag: LoopLag


async def _lag_counts(url: str) -> LoopLag:
    async with aiohttp.ClientSession() as session, session.get(url + "/debug/state") as response:
        return msgspec.json.decode(await response.read(), type=_State).loop_lag


def longest_lag_ms(before: LoopLag, after: LoopLag) -> float:
    """The bound below which every turn between the two was late; infinite beyond the last one."""
    bounds_ms = [*(1000.0 * bound_s for bound_s in after.bounds_s), float("inf")]
    late = zip(bounds_ms, before.counts, after.counts, strict=True)
    return max((bound for bound, old, new in late if new > old), default=0.0)
