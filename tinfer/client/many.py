"""Many requests at once, but not too many: so many of them are under way as there are workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


async def each(
    items: Iterator[ItemT], do: Callable[[ItemT], Awaitable[None]], max_concurrency: int
) -> None:
    """Do this with every item, in order, at most `max_concurrency` at a time.

    Items are taken only as there is room for them. The first error ends it and is raised; then, and
    when it is cancelled, what is under way is cancelled and over before it returns.
    """

    async def work() -> None:
        for item in items:
            await do(item)

    tasks = [asyncio.create_task(work()) for _ in range(max_concurrency)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
