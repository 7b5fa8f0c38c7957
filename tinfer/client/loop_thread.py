"""A thread with an event loop, in which callers without one run their coroutines.

Invariant: whenever a caller is interrupted, from the hand-in on, its coroutine is cancelled; and
nothing is handed in once the thread has been told to end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from tinfer.client.errors import ConnectionFailed

ResultT = TypeVar("ResultT")


class LoopThread:
    """Starts at the first call; `clean_up` is run in it before it ends."""

    def __init__(self, clean_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._clean_up = clean_up
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def run(self, make: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """What the coroutine returns or raises; an interrupt of the caller cancels it."""
        # It is here before the coroutine is, so there is no moment at which it cannot be cancelled.
        answer: Future[ResultT] = Future()
        try:
            self._hand_in(make, answer)
            return answer.result()
        except CancelledError:
            raise ConnectionFailed("the client was closed") from None
        except BaseException:
            answer.cancel()
            raise

    def close(self) -> None:
        """Clean up, cancel what still runs, and wait for the thread to end."""
        with self._lock:
            already, self._closed = self._closed, True
        thread = self._thread
        if thread is None:
            return
        if not already and self._ready.exception() is None:
            loop, stop = self._ready.result()
            loop.call_soon_threadsafe(stop.set)
        thread.join()

    def _hand_in(
        self, make: Callable[[], Coroutine[Any, Any, ResultT]], answer: Future[ResultT]
    ) -> None:
        with self._lock:
            if self._closed:
                raise ConnectionFailed("the client is closed")
            if self._thread is None:
                # A daemon: a program that forgets `close()` still ends.
                self._thread = threading.Thread(
                    target=self._main, name="tinfer-client", daemon=True
                )
                self._thread.start()
            loop, _ = self._ready.result()
            # Under the lock, so that it comes before the order to end.
            loop.call_soon_threadsafe(self._begin, loop, make, answer)

    def _main(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:
            if self._ready.done():
                raise
            # No loop could be made: whoever waits for it is told.
            self._ready.set_exception(error)

    async def _live(self) -> None:
        stop = asyncio.Event()
        self._ready.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
        await self._clean_up()

    def _begin(
        self,
        loop: asyncio.AbstractEventLoop,
        make: Callable[[], Coroutine[Any, Any, ResultT]],
        answer: Future[ResultT],
    ) -> None:
        if answer.cancelled():
            return
        task = loop.create_task(make())
        self._tasks.add(task)

        def give_up(answer: Future[ResultT]) -> None:
            if answer.cancelled():
                loop.call_soon_threadsafe(task.cancel)

        def settle(task: asyncio.Task[ResultT]) -> None:
            self._tasks.discard(task)
            error = None if task.cancelled() else task.exception()
            if task.cancelled():
                answer.cancel()
            elif answer.set_running_or_notify_cancel():
                if error is None:
                    answer.set_result(task.result())
                else:
                    answer.set_exception(error)

        answer.add_done_callback(give_up)
        task.add_done_callback(settle)
