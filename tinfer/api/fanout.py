"""One request, several sequences: submit them together, read them as one, leave none behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType

from tinfer.api.service import Delta, Generation, Service, Sink, Stream
from tinfer.errors import EngineFailed

# Deltas of different sequences that were ready at the same moment, with the sequence's index.
Batch = list[tuple[int, Delta]]
_Queue = asyncio.Queue[tuple[int, Delta | Exception]]


class Fanout:
    """Owns the streams of one request from submission to the end of the `async with` block.

    Entering gives the batches: every delta of every stream, in order within each, until all have
    finished. Iterating raises what a stream raises, and `EngineFailed` for one that ends without a
    finish reason or with `error`. Leaving the block, for whatever reason, cancels every stream;
    those that ended do not mind.
    """

    def __init__(self, service: Service, generations: Sequence[Generation]) -> None:
        self._service = service
        self._generations = generations
        self._streams: list[Stream] = []
        self._readers: list[asyncio.Task[None]] = []
        self._batches = self._read_one()

    async def __aenter__(self) -> AsyncIterator[Batch]:
        """Submits in order. Raises what `Service.submit` raises, with nothing left running."""
        try:
            for generation in self._generations:
                self._streams.append(self._service.submit(generation))
        except BaseException:
            self._cancel()
            raise
        if len(self._streams) > 1:
            self._batches = self._read_all()
        return self._batches

    def write_through(self, sink: Sink) -> None:
        """Have `sink` take deltas before they become batches; several streams only make batches."""
        if len(self._streams) == 1:
            self._streams[0].write_through(sink)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cancel()
        await self._batches.aclose()
        if self._readers:
            await asyncio.gather(*self._readers, return_exceptions=True)

    async def _read_one(self) -> AsyncGenerator[Batch, None]:
        async with aclosing(_checked(self._streams[0])) as deltas:
            async for delta in deltas:
                yield [(0, delta)]

    async def _read_all(self) -> AsyncGenerator[Batch, None]:
        # One slot per stream bounds what is read ahead of a slow client.
        queue: _Queue = asyncio.Queue(len(self._streams))
        self._readers = [
            asyncio.create_task(_read(index, stream, queue))
            for index, stream in enumerate(self._streams)
        ]
        num_open = len(self._streams)
        while num_open:
            ready = [await queue.get()]
            while not queue.empty():
                ready.append(queue.get_nowait())
            batch: Batch = []
            failure: Exception | None = None
            for index, item in ready:
                if isinstance(item, Exception):
                    failure = failure or item
                else:
                    batch.append((index, item))
                    num_open -= item.finish_reason is not None
            if batch:
                yield batch
            if failure is not None:
                raise failure

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()
        for reader in self._readers:
            reader.cancel()


async def _checked(stream: Stream) -> AsyncGenerator[Delta, None]:
    """A stream up to its finish reason, which it must have."""
    async for delta in stream:
        if delta.finish_reason == "error":
            raise EngineFailed("the engine failed on this request")
        yield delta
        if delta.finish_reason is not None:
            return
    raise EngineFailed("the answer ended without a finish reason")


async def _read(index: int, stream: Stream, queue: _Queue) -> None:
    try:
        async with aclosing(_checked(stream)) as deltas:
            async for delta in deltas:
                await queue.put((index, delta))
    except Exception as error:  # noqa: BLE001 - it is raised again by the one who reads the queue
        await queue.put((index, error))
