"""How a measurement is stopped from outside, and what it does not let go on then."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

DoneT = TypeVar("DoneT")


class Interrupted(Exception):
    """Stopped before its end; what was measured by then is the result, if there is any."""


async def unless_stopped(doing: Coroutine[Any, Any, DoneT], stop: asyncio.Event) -> DoneT:
    """Its result, or `Interrupted` as soon as `stop` is set; then it is cancelled and over."""
    task, stopping = asyncio.create_task(doing), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            raise Interrupted
        return task.result()
    finally:
        for one in (task, stopping):
            one.cancel()
        await asyncio.wait({task, stopping})


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C and SIGTERM set while the block runs, on the running loop."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
