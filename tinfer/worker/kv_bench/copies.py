"""One transport, layout and page size: the ways to copy the same bytes, measured in turns.

Each way copies blocks of its own, so that none finds another's bytes in the cache, in another order
in each round:

  ours    the transport's copy of scattered blocks; planning is timed apart
  pieces  the same pieces, each by memcpy, in one C loop. On a GPU: pages at even distances in one
          kernel, an upper bound
  one     as many bytes in one piece: memmove, or one copy on the device
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from msgspec import Struct

from tinfer.errors import StartError
from tinfer.worker.kv.geometry import CopyPlan, copy_plan
from tinfer.worker.kv.host_transport import HostTransport
from tinfer.worker.kv.memory import ShmBuffer
from tinfer.worker.kv.transport import PeerMemory
from tinfer.worker.kv_bench.cache import fragmented
from tinfer.worker.kv_bench.exporter import Offer, exporter, make_transport
from tinfer.worker.kv_bench.options import (
    CPU_KINDS,
    GPU_KINDS,
    NUM_LAYERS,
    HandoffOptions,
    Kind,
    Layout,
)
from tinfer.worker.kv_bench.pieces import CopyPieces


class Row(Struct, frozen=True, kw_only=True):
    """Medians of one transport, layout, page size and hand-off size.

    `seconds` and `gb_s` are by way. `ratio_to` is ours over another way's speed, the median of the
    rounds, with the least and the largest round in `least_ratio_to` and `largest_ratio_to`.
    `num_ranges`: pieces of one hand-off, those that touch counted as one. `plan_s`: planning.
    """

    transport: Kind
    layout: Layout
    page_kib: int
    size_kib: float
    num_blocks: int
    num_ranges: int
    plan_s: float
    seconds: dict[str, float]
    gb_s: dict[str, float]
    ratio_to: dict[str, float]
    least_ratio_to: dict[str, float]
    largest_ratio_to: dict[str, float]


def rows_of(
    options: HandoffOptions,
    device: torch.device,
    buffer_bytes: int,
    copy_pieces: CopyPieces | None,
) -> Iterator[Row]:
    """Measure everything, one row after the other. Raises `StartError`."""
    for kind in GPU_KINDS if device.type == "cuda" else CPU_KINDS:
        for layout in options.layouts:
            for page_kib in options.pages:
                page_bytes = page_kib * 1024
                with exporter(kind, layout, device, buffer_bytes, page_bytes) as offer:
                    bench = Bench(kind, offer, device, copy_pieces, options.seed)
                    try:
                        bench.check()
                        counts = dict.fromkeys(map(bench.num_blocks, options.sizes))
                        for num_blocks in counts:
                            yield bench.row(layout, page_kib, num_blocks, options.rounds)
                    finally:
                        bench.close()


class Bench:
    """Buffers on both sides, and the ways to copy between them."""

    def __init__(
        self,
        kind: Kind,
        offer: Offer,
        device: torch.device,
        copy_pieces: CopyPieces | None,
        seed: int,
    ) -> None:
        self.kind = kind
        self.rng = random.Random(f"{seed} {kind} {offer.geometry.layout}")
        self.device = device
        self.copy_pieces = copy_pieces
        self.geometry = offer.geometry
        self.page_bytes = offer.geometry.regions[0].page_bytes
        self.transport = make_transport(kind, device, offer.geometry.num_blocks)
        self.peer: PeerMemory = self.transport.map(offer.export, offer.geometry)
        self.source = _bytes_of(self.peer)
        self._buffer: ShmBuffer | None = None
        self.target = self._new_target(offer.geometry.total_bytes)
        self.free = [fragmented(offer.geometry.num_blocks, self.rng) for _ in range(2)]
        self.plan_s: list[float] = []

    def _new_target(self, total_bytes: int) -> torch.Tensor:
        if self.device.type == "cuda":
            return torch.zeros(total_bytes, dtype=torch.int8, device=self.device)
        self._buffer = ShmBuffer(total_bytes)
        self._buffer.populate_in_background().join()
        return self._buffer.as_tensor()

    def next_plan(self, num_blocks: int) -> CopyPlan:
        """Take blocks from the front of both free lists, put them back at the end."""
        lists = []
        for free in self.free:
            blocks = [free.popleft() for _ in range(num_blocks)]
            free.extend(reversed(blocks))
            lists.append([blocks])
        started_s = time.perf_counter()
        plan = copy_plan(self.peer.geometry, self.geometry, lists[0], lists[1])
        _ = plan.sizes if self.device.type == "cuda" else plan.runs
        self.plan_s.append(time.perf_counter() - started_s)
        return plan

    # --- the ways -----------------------------------------------------------------------------

    def ways(self) -> dict[str, Callable[[CopyPlan], None]]:
        """By name; memcpy in a C loop only where there is one."""
        ways: dict[str, Callable[[CopyPlan], None]] = {"ours": self.ours, "one": self.one}
        if self.device.type == "cuda":
            ways["pieces"] = self.even_pieces
        elif self.copy_pieces is not None:
            ways["pieces"] = self.same_pieces
        return ways

    def ours(self, plan: CopyPlan) -> None:
        self.transport.copy(self.peer, plan, self.target)

    def one(self, plan: CopyPlan) -> None:
        size = plan.num_bytes
        at = self.rng.randrange(0, max(1, self.target.numel() - size), 4096)
        if self.device.type == "cuda":
            self.target[at : at + size].copy_(self.source[at : at + size], non_blocking=True)
            torch.cuda.synchronize(self.device)
        else:
            ctypes.memmove(self.target.data_ptr() + at, self.source.data_ptr() + at, size)

    def same_pieces(self, plan: CopyPlan) -> None:
        assert self.copy_pieces is not None
        of, to, sizes = plan.ranges
        self.copy_pieces(self.target.data_ptr(), self.source.data_ptr(), to, of, sizes)

    def even_pieces(self, plan: CopyPlan) -> None:
        count = plan.num_bytes // self.page_bytes
        num_pages = self.source.numel() // self.page_bytes
        first = self.rng.randrange(0, max(1, num_pages - 2 * count + 1))
        window = slice(first * self.page_bytes, (first + 2 * count) * self.page_bytes)
        to, of = (
            side[window].view(count, 2 * self.page_bytes)[:, : self.page_bytes].view(torch.int64)
            for side in (self.target, self.source)
        )
        to.copy_(of, non_blocking=True)
        torch.cuda.synchronize(self.device)

    # --- measuring ----------------------------------------------------------------------------

    def check(self) -> None:
        """Copy once and compare every piece, so that no number is of a wrong copy.

        Raises `StartError` where the transport copied wrong bytes.
        """
        plan = self.next_plan(max(1, min(64, self.geometry.num_blocks // 4)))
        self.ours(plan)
        if isinstance(self.transport, HostTransport):
            return  # nothing is staged here: the pool holds zeros, and only the time counts
        for src, dst, size in zip(*(column.tolist() for column in plan.ranges), strict=True):
            if not torch.equal(self.target[dst : dst + size], self.source[src : src + size]):
                raise StartError(f"{self.kind} copied wrong bytes")

    def num_blocks(self, size_kib: int) -> int:
        """Whole blocks of about that many KiB: at least one, at most a quarter of all."""
        wanted = round(size_kib * 1024 / (self.page_bytes * NUM_LAYERS))
        return max(1, min(wanted, self.geometry.num_blocks // 4))

    def row(self, layout: Layout, page_kib: int, num_blocks: int, rounds: int) -> Row:
        """Medians of a hand-off of so many blocks."""
        self.plan_s.clear()
        taken_s, num_ranges = self._taken(num_blocks, rounds)
        size_bytes = num_blocks * self.page_bytes * NUM_LAYERS
        ratios = {
            name: [theirs / ours for theirs, ours in zip(times_s, taken_s["ours"], strict=True)]
            for name, times_s in taken_s.items()
            if name != "ours"
        }
        seconds = {name: statistics.median(times_s) for name, times_s in taken_s.items()}
        return Row(
            transport=self.kind,
            layout=layout,
            page_kib=page_kib,
            size_kib=size_bytes / 1024,
            num_blocks=num_blocks,
            num_ranges=num_ranges,
            plan_s=statistics.median(self.plan_s),
            seconds=seconds,
            gb_s={name: size_bytes / taken / 1e9 for name, taken in seconds.items()},
            ratio_to={name: statistics.median(of_all) for name, of_all in ratios.items()},
            least_ratio_to={name: min(of_all) for name, of_all in ratios.items()},
            largest_ratio_to={name: max(of_all) for name, of_all in ratios.items()},
        )

    def _taken(self, num_blocks: int, rounds: int) -> tuple[dict[str, list[float]], int]:
        ways = self.ways()
        taken_s: dict[str, list[float]] = {name: [] for name in ways}
        order = list(ways)
        num_ranges = 0
        for number in range(rounds + 1):
            self.rng.shuffle(order)
            for name in order:
                plan = self.next_plan(num_blocks)
                num_ranges = len(plan.sizes)
                started_s = time.perf_counter()
                ways[name](plan)
                if number:  # the first round warms up
                    taken_s[name].append(time.perf_counter() - started_s)
        return taken_s, num_ranges

    def close(self) -> None:
        """Give everything back."""
        self.source = torch.empty(0)
        self.transport.unmap(self.peer)
        self.transport.close()
        if self._buffer is not None:
            self._buffer.close()


def _bytes_of(peer: Any) -> torch.Tensor:
    """The mapped peer's bytes as a tensor, for the baselines."""
    if hasattr(peer, "tensor"):
        return peer.tensor  # type: ignore[no-any-return]
    if hasattr(peer, "pool"):
        return peer.pool.tensor  # type: ignore[no-any-return]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only memory: the baselines only read it
        return torch.from_numpy(np.frombuffer(peer.memory.mapping, np.int8))
