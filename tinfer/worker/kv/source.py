"""Which blocks a reader is told to copy: the KV blocks themselves, or slots they are staged in.

The scheduler side of the connector prepares a source when it opens a lease and finishes it when
the lease is closed; the code path is the same for every transport. Slots are handed out in an
order that depends only on the calls made, so every rank of a worker stages to the same slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tinfer.worker.kv.errors import StagingFull
from tinfer.worker.kv.geometry import Geometry, Region
from tinfer.worker.kv.lease import LeaseRef

DEFAULT_STAGING_SLOTS = 1024  # 16K tokens in blocks of 16: 2 GiB for an 8B model in bf16

BlockLists = tuple[tuple[int, ...], ...]


class SourceBlocks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Block ids per group, in the geometry of what the owner exports.

    A reader that lacks only the end of a request's blocks takes the tail of each list.
    """

    blocks: BlockLists


class StageOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Copy KV blocks to staging slots, per group, then mark the lease ready."""

    lease: LeaseRef
    blocks: BlockLists
    slots: BlockLists


class BlockSource(Protocol):
    """Prepares what a lease offers to its reader."""

    @property
    def needs_staging(self) -> bool:
        """Tell whether a lease opens unready, to be marked ready once its `StageOrder` is done."""

    def prepare(self, blocks: Sequence[Sequence[int]]) -> SourceBlocks:
        """Return where the reader will find `blocks` (per group).

        Raises:
            StagingFull: no room; nothing was taken.
        """

    def order(
        self, lease: LeaseRef, blocks: Sequence[Sequence[int]], source: SourceBlocks
    ) -> StageOrder | None:
        """Return what the worker side must stage before the lease is ready, if anything."""

    def finish(self, source: SourceBlocks) -> None:
        """Take back what `prepare` gave; exactly once, after the lease is closed."""


class DirectSource:
    """Readers copy from the KV buffer itself (shared memory, CUDA IPC)."""

    needs_staging = False

    def prepare(self, blocks: Sequence[Sequence[int]]) -> SourceBlocks:
        """Return the blocks themselves."""
        return SourceBlocks(_frozen(blocks))

    def order(
        self, lease: LeaseRef, blocks: Sequence[Sequence[int]], source: SourceBlocks
    ) -> StageOrder | None:
        """Return None: nothing is staged."""
        return None

    def finish(self, source: SourceBlocks) -> None:
        """Nothing was taken."""


class StagedSource:
    """Readers copy from a bounded pool of host slots, one block to a slot."""

    needs_staging = True

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = deque(range(num_slots))

    @property
    def num_used(self) -> int:
        """Return the number of slots taken."""
        return self._num_slots - len(self._free)

    def prepare(self, blocks: Sequence[Sequence[int]]) -> SourceBlocks:
        """Take a slot per block.

        Raises:
            StagingFull: fewer slots are free than blocks asked for; nothing was taken.
        """
        num_blocks = sum(len(group) for group in blocks)
        if num_blocks > len(self._free):
            raise StagingFull(
                f"{num_blocks} blocks to stage, {len(self._free)} of {self._num_slots} slots free"
            )
        taken = [[self._free.popleft() for _ in group] for group in blocks]
        return SourceBlocks(_frozen(taken))

    def order(
        self, lease: LeaseRef, blocks: Sequence[Sequence[int]], source: SourceBlocks
    ) -> StageOrder | None:
        """Return the order to copy each block to its slot."""
        return StageOrder(lease=lease, blocks=_frozen(blocks), slots=source.blocks)

    def finish(self, source: SourceBlocks) -> None:
        """Return the slots to the pool."""
        for group in source.blocks:
            self._free.extend(group)


def block_source(transport: str, num_staging_slots: int = DEFAULT_STAGING_SLOTS) -> BlockSource:
    """Return the source that fits a transport by its name.

    `num_staging_slots` is what the worker side's `HostTransport` was built with.
    """
    return StagedSource(num_staging_slots) if transport == "host" else DirectSource()


def staging_geometry(geometry: Geometry, num_slots: int) -> Geometry:
    """Return the layout of a staging pool: per slot, the pages of one block, layer after layer.

    Groups overlay each other: a slot holds a block of one group at a time.
    """
    slot_bytes = staging_slot_bytes(geometry)
    used_bytes = [0] * geometry.num_groups
    regions = []
    for region in geometry.regions:
        regions.append(
            Region(
                offset_bytes=used_bytes[region.group],
                num_layers=region.num_layers,
                layer_stride_bytes=region.page_bytes,
                block_stride_bytes=slot_bytes,
                page_bytes=region.page_bytes,
                group=region.group,
            )
        )
        used_bytes[region.group] += region.num_layers * region.page_bytes
    return msgspec.structs.replace(
        geometry,
        num_blocks=num_slots,
        total_bytes=num_slots * slot_bytes,
        regions=tuple(regions),
    )


def staging_slot_bytes(geometry: Geometry) -> int:
    """Return the bytes of one slot: the largest block of any group."""
    sizes = [0] * geometry.num_groups
    for region in geometry.regions:
        sizes[region.group] += region.num_layers * region.page_bytes
    return max(sizes)


def _frozen(blocks: Sequence[Sequence[int]]) -> BlockLists:
    return tuple(tuple(group) for group in blocks)
