"""Several sequences read as one: order, batches, and nothing left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.api.canned import CannedService, say
from tinfer.api.fanout import Fanout
from tinfer.api.service import Delta, Generation
from tinfer.core.sampling import SamplingSpec
from tinfer.errors import EngineFailed, Overloaded, WorkerLost

GENERATION = Generation(prompt_token_ids=[1], sampling=SamplingSpec(max_tokens=1))


async def read(fanout: Fanout) -> dict[int, str]:
    texts: dict[int, str] = {}
    async with fanout as batches:
        async for batch in batches:
            for index, delta in batch:
                texts[index] = texts.get(index, "") + delta.text
    return texts


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_every_delta_arrives_in_order(count: int) -> None:
    service = CannedService()
    service.script = lambda index: say(*f"text {index}")
    texts = await read(Fanout(service, [GENERATION] * count))
    assert texts == {i: f"text {i}" for i in range(count)}
    assert all(s.cancelled.is_set() for s in service.streams)


async def test_deltas_that_are_ready_come_in_one_batch() -> None:
    service = CannedService()
    service.script = lambda index: say("x")
    async with Fanout(service, [GENERATION] * 3) as batches:
        assert [index for index, _ in await anext(batches)] == [0, 1, 2]


async def test_a_refused_sequence_cancels_the_earlier_ones() -> None:
    service = CannedService()
    service.script = lambda index: Overloaded("full") if index == 2 else say("x")
    with pytest.raises(Overloaded):
        await read(Fanout(service, [GENERATION] * 4))
    assert [s.cancelled.is_set() for s in service.streams] == [True, True]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([Delta("a"), WorkerLost("died")], WorkerLost),
        ([Delta("a", finish_reason="error")], EngineFailed),
        ([Delta("a")], EngineFailed),
        ([RuntimeError("bug")], RuntimeError),
    ],
)
async def test_failures_are_raised_and_cancel_the_rest(
    script: list[Any], error: type[Exception], count: int
) -> None:
    service = CannedService()
    never = asyncio.Event()
    service.script = lambda index: script if index == 0 else [Delta("b"), never]
    with pytest.raises(error):
        await read(Fanout(service, [GENERATION] * count))
    assert all(s.cancelled.is_set() for s in service.streams)


async def test_what_came_before_a_failure_is_not_lost() -> None:
    service = CannedService()
    service.script = lambda index: [WorkerLost("died")] if index == 1 else say("kept")
    seen: list[str] = []
    with pytest.raises(WorkerLost):
        async with Fanout(service, [GENERATION] * 2) as batches:
            async for batch in batches:
                seen += [delta.text for _, delta in batch]
    assert seen == ["kept"]


@pytest.mark.parametrize("count", [1, 3])
async def test_a_cancelled_reader_leaves_no_task(count: int) -> None:
    service = CannedService()
    never = asyncio.Event()
    service.script = lambda index: [never]
    reader = asyncio.create_task(read(Fanout(service, [GENERATION] * count)))
    await service.started(count)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert all(s.cancelled.is_set() for s in service.streams)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("count", [1, 3])
async def test_a_reader_that_stops_early_leaves_no_task(count: int) -> None:
    service = CannedService()
    service.script = lambda index: say(*"abc")
    async with Fanout(service, [GENERATION] * count) as batches:
        await anext(batches)
    assert all(s.cancelled.is_set() for s in service.streams)
    assert asyncio.all_tasks() == {asyncio.current_task()}
