"""Copies between a device's memory and mapped memory, on a stream beside the engine's.

Three ways to carry out a plan on a GPU: `gather` moves equal rows with two index kernels, whatever
their number; `batch` gives all ranges to the driver in one call; `loop` issues a copy per range.
Every call into torch may give up the GIL and wait a switch interval (5 ms) to get it back from a
busy engine thread, so the number of calls matters more than what each one costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tinfer.worker.kv.geometry import CopyPlan, Int64Array
from tinfer.worker.kv.transport import BatchCopy

Strategy = Literal["gather", "batch", "loop"]

_MIN_ROW_BYTES = 512  # below this an index kernel spends its time on indices
_MAX_ROW_BYTES = 1 << 20
_TEMP_BYTES = 32 << 20  # bound of the gather's scratch memory on the device
# Ranges up to this mean size go to the index kernels: a copy engine has a fixed cost per range of
# about a microsecond, the time in which a kernel moves a range of this size. By reasoning, not
# measured; `tinfer bench handoff` measures all three on the machine at hand.
_GATHER_BELOW_BYTES = 256 << 10
_LOOP_UP_TO = 4


@dataclass(frozen=True)
class RowIndex:
    """A plan as moves of equal rows: row `src[i]` to row `dst[i]`, each `row_bytes` long."""

    row_bytes: int
    src: Int64Array
    dst: Int64Array

    def sorted_by_dst(self) -> RowIndex:
        """Return the same moves in the order of their destination."""
        order = np.argsort(self.dst, kind="stable")
        return RowIndex(self.row_bytes, self.src[order], self.dst[order])


def row_index(plan: CopyPlan) -> RowIndex | None:
    """Express a plan in equal rows; None if it has no common row of a useful size."""
    src, dst, sizes = plan.ranges
    if len(sizes) == 0:
        return None
    row_bytes = int(np.gcd.reduce(np.concatenate((src, dst, sizes))))
    while row_bytes > _MAX_ROW_BYTES and row_bytes % 2 == 0:
        row_bytes //= 2
    if row_bytes < _MIN_ROW_BYTES or row_bytes > _MAX_ROW_BYTES or row_bytes % 8:
        return None
    counts = sizes // row_bytes
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return RowIndex(
        row_bytes,
        np.repeat(src // row_bytes, counts) + within,
        np.repeat(dst // row_bytes, counts) + within,
    )


def runs_of(rows: Int64Array) -> Iterator[tuple[int, int, int]]:
    """Yield (position, first row, number of rows) for each run of consecutive row numbers."""
    starts = np.flatnonzero(np.append(True, np.diff(rows) != 1)) if len(rows) else rows
    counts = np.diff(np.append(starts, len(rows)))
    yield from zip(starts.tolist(), rows[starts].tolist(), counts.tolist(), strict=True)


class DeviceCopier:
    """Carries out plans for one device; on a CPU "device" every call simply runs at once."""

    def __init__(
        self,
        device: torch.device,
        batch_copy: BatchCopy | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self.device = device
        self._batch_copy = batch_copy
        self._strategy = strategy
        self._stream = _new_stream(device) if device.type == "cuda" else None

    def fence(self) -> torch.cuda.Event | None:
        """Return an event after the work queued so far on the calling thread's stream."""
        if self._stream is None:
            return None
        return _record_on(torch.cuda.current_stream(self.device))

    def copy(
        self,
        src: torch.Tensor,
        dst: torch.Tensor,
        plan: CopyPlan,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Copy between int8 buffers that the device can address; returns when done."""
        with self._side_stream(after):
            index = row_index(plan)
            strategy = self._strategy or self._choose(plan, index)
            if strategy == "gather" and index is not None:
                self._gather(src, dst, index)
            elif strategy == "batch" and self._batch_copy is not None:
                _batch(self._batch_copy, src, dst, plan)
            else:
                _loop(src, dst, plan)
            done = self._recorded()
        _wait(done)

    def copy_in(
        self,
        host: torch.Tensor,
        dst: torch.Tensor,
        plan: CopyPlan,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Copy from host memory to the device; returns when done.

        Host ranges travel in long transfers and are spread on the device.
        """
        with self._side_stream(after):
            index = row_index(plan)
            if index is None:
                _loop(host, dst, plan)
            else:
                host_rows, dst_rows = _rows(host, index.row_bytes), _rows(dst, index.row_bytes)
                for src_part, dst_part in _chunks(index):
                    temp = torch.empty(
                        (len(src_part), index.row_bytes // 8),
                        dtype=torch.int64,
                        device=self.device,
                    )
                    for at, row, count in runs_of(src_part):
                        temp[at : at + count].copy_(host_rows[row : row + count], non_blocking=True)
                    dst_rows.index_copy_(0, self._on_device(dst_part), temp)
            done = self._recorded()
        _wait(done)

    def start_copy_out(
        self, src: torch.Tensor, host: torch.Tensor, plan: CopyPlan
    ) -> torch.cuda.Event | None:
        """Queue the copy from the device to host memory; the event tells when it is done."""
        with self._side_stream(None):
            index = row_index(plan)
            if index is None:
                _loop(src, host, plan)
            else:
                index = index.sorted_by_dst()
                src_rows, host_rows = _rows(src, index.row_bytes), _rows(host, index.row_bytes)
                for src_part, dst_part in _chunks(index):
                    temp = src_rows.index_select(0, self._on_device(src_part))
                    for at, row, count in runs_of(dst_part):
                        host_rows[row : row + count].copy_(temp[at : at + count], non_blocking=True)
            return self._recorded()

    def _choose(self, plan: CopyPlan, index: RowIndex | None) -> Strategy:
        num_ranges = len(plan.sizes)
        if num_ranges <= _LOOP_UP_TO:
            return "loop"
        small = plan.num_bytes < num_ranges * _GATHER_BELOW_BYTES
        if index is not None and (small or self._batch_copy is None):
            return "gather"
        return "batch" if self._batch_copy is not None else "loop"

    def _gather(self, src: torch.Tensor, dst: torch.Tensor, index: RowIndex) -> None:
        src_rows, dst_rows = _rows(src, index.row_bytes), _rows(dst, index.row_bytes)
        for src_part, dst_part in _chunks(index):
            rows = src_rows.index_select(0, self._on_device(src_part))
            dst_rows.index_copy_(0, self._on_device(dst_part), rows)

    def _on_device(self, index: Int64Array) -> torch.Tensor:
        host = torch.from_numpy(index)
        if self._stream is None:
            return host
        # From pageable memory the copy would wait for the stream, and the engine's thread with it.
        return host.pin_memory().to(self.device, non_blocking=True)

    @contextmanager
    def _side_stream(self, after: torch.cuda.Event | None) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            yield

    def _recorded(self) -> torch.cuda.Event | None:
        return None if self._stream is None else _record_on(self._stream)


def is_done(event: torch.cuda.Event | None) -> bool:
    """Tell whether the work before an event has completed; without an event it has."""
    if event is None:
        return True
    done: bool = event.query()  # type: ignore[no-untyped-call]
    return done


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _record_on(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _wait(event: torch.cuda.Event | None) -> None:
    if event is not None:
        event.synchronize()


def _rows(buffer: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """View an int8 buffer as [rows, row_bytes / 8] int64, so that kernels move 8 bytes a thread."""
    whole = buffer.numel() // row_bytes * row_bytes
    return buffer[:whole].view(torch.int64).view(-1, row_bytes // 8)


def _chunks(index: RowIndex) -> Iterator[tuple[Int64Array, Int64Array]]:
    step = max(1, _TEMP_BYTES // index.row_bytes)
    for start in range(0, len(index.src), step):
        yield index.src[start : start + step], index.dst[start : start + step]


def _batch(copy: BatchCopy, src: torch.Tensor, dst: torch.Tensor, plan: CopyPlan) -> None:
    src_offsets, dst_offsets, sizes = plan.ranges
    copy(
        torch.from_numpy(src_offsets + src.data_ptr()),
        torch.from_numpy(dst_offsets + dst.data_ptr()),
        torch.from_numpy(sizes),
    )


def _loop(src: torch.Tensor, dst: torch.Tensor, plan: CopyPlan) -> None:
    columns = (column.tolist() for column in plan.ranges)
    for src_at, dst_at, size in zip(*columns, strict=True):
        dst[dst_at : dst_at + size].copy_(src[src_at : src_at + size], non_blocking=True)
