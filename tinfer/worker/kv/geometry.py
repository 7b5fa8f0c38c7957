"""Where KV blocks lie in a worker's one backing buffer, and the byte ranges a hand-off copies.

The page of layer `l` of region `r` for block `b` starts at
`offset + l * layer_stride + b * block_stride`. This module owns the invariant that every offset it
hands out lies inside the buffer its geometry describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from tinfer.worker.kv.errors import GeometryMismatch

Int64Array = npt.NDArray[np.int64]


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run of layers with equal pages, placed by two strides; `group` names its block table."""

    offset_bytes: int
    num_layers: int
    layer_stride_bytes: int
    block_stride_bytes: int
    page_bytes: int
    group: int

    def end_bytes(self, num_blocks: int) -> int:
        """Return the first byte after the region's last page."""
        return (
            self.offset_bytes
            + (self.num_layers - 1) * self.layer_stride_bytes
            + (num_blocks - 1) * self.block_stride_bytes
            + self.page_bytes
        )


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All a peer needs to find blocks in a worker's buffer; published before the first copy.

    Raises:
        ValueError: a region reaches outside `total_bytes`, or a size is not positive.
    """

    layout: str
    dtype: str
    block_tokens: int
    num_blocks: int
    total_bytes: int
    model_hash: str
    tp_size: int
    tp_rank: int
    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        # Peers send geometries, and copies run on raw addresses: nothing outside may be reachable.
        if self.num_blocks < 1 or not self.regions:
            raise ValueError("a geometry has at least one block and one region")
        for index, region in enumerate(self.regions):
            smallest = min(region.num_layers, region.page_bytes)
            strides = min(region.layer_stride_bytes, region.block_stride_bytes)
            if smallest < 1 or strides < 0 or region.offset_bytes < 0 or region.group < 0:
                raise ValueError(f"region {index} has a size or stride out of range")
            if region.end_bytes(self.num_blocks) > self.total_bytes:
                raise ValueError(f"region {index} reaches beyond {self.total_bytes} bytes")

    @property
    def num_groups(self) -> int:
        """Return the number of block tables."""
        return 1 + max(region.group for region in self.regions)


def check_compatible(mine: Geometry, theirs: Geometry) -> None:
    """Check that blocks of one geometry can be copied into the other.

    Offsets, strides, the number of blocks and the total size may differ.

    Raises:
        GeometryMismatch: names the first field that must agree and does not.
    """
    for field in ("layout", "dtype", "block_tokens", "model_hash", "tp_size", "tp_rank"):
        _agree(field, getattr(mine, field), getattr(theirs, field))
    _agree("num_regions", len(mine.regions), len(theirs.regions))
    for index, (ours, other) in enumerate(zip(mine.regions, theirs.regions, strict=True)):
        for field in ("num_layers", "page_bytes", "group"):
            _agree(f"regions[{index}].{field}", getattr(ours, field), getattr(other, field))


def _agree(field: str, mine: object, theirs: object) -> None:
    if mine != theirs:
        raise GeometryMismatch(field, mine, theirs)


@dataclass(frozen=True)
class RegionRuns:
    """Runs of blocks to copy within one region: `counts[i]` blocks from each starting block.

    A region whose layers touch (block-outermost) appears here as one layer of larger pages.
    """

    src: Region
    dst: Region
    src_blocks: Int64Array
    dst_blocks: Int64Array
    counts: Int64Array


@dataclass(frozen=True)
class CopyPlan:
    """What one pull copies, as strided runs per region and as flat byte ranges.

    `src_offsets`, `dst_offsets` and `sizes` are int64 arrays of equal length, in bytes, sorted by
    source offset; ranges that touch on both sides are one range.
    """

    src: Geometry
    dst: Geometry
    runs: tuple[RegionRuns, ...]

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes copied."""
        return sum(
            int(runs.counts.sum()) * runs.src.page_bytes * runs.src.num_layers for runs in self.runs
        )

    @cached_property
    def ranges(self) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return (src_offsets, dst_offsets, sizes)."""
        parts = [_expand(runs) for runs in self.runs]
        if not parts:
            empty = np.empty(0, np.int64)
            return empty, empty, empty
        src, dst, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _merge(src, dst, sizes)

    @property
    def src_offsets(self) -> Int64Array:
        """Return where each range starts in the source buffer."""
        return self.ranges[0]

    @property
    def dst_offsets(self) -> Int64Array:
        """Return where each range starts in the destination buffer."""
        return self.ranges[1]

    @property
    def sizes(self) -> Int64Array:
        """Return the length of each range."""
        return self.ranges[2]


def copy_plan(
    src: Geometry,
    dst: Geometry,
    src_blocks: Sequence[Sequence[int]],
    dst_blocks: Sequence[Sequence[int]],
) -> CopyPlan:
    """Plan the copy of `src_blocks[g][i]` to `dst_blocks[g][i]` for every group g.

    Raises:
        ValueError: the lists differ in length, or name a block outside their buffer.
        GeometryMismatch: the two sides' pages do not correspond.
    """
    check_compatible(dst, src)
    if not len(src_blocks) == len(dst_blocks) == src.num_groups:
        raise ValueError(
            f"{len(src_blocks)} source and {len(dst_blocks)} destination block lists "
            f"for {src.num_groups} groups"
        )
    tables = [
        _sorted_pairs(group, src, dst, src_blocks[group], dst_blocks[group])
        for group in range(src.num_groups)
    ]
    runs = []
    for ours, theirs in zip(dst.regions, src.regions, strict=True):
        sources, targets = tables[ours.group]
        if len(sources):
            runs.append(_region_runs(theirs, ours, sources, targets))
    return CopyPlan(src=src, dst=dst, runs=tuple(runs))


def _sorted_pairs(
    group: int,
    src: Geometry,
    dst: Geometry,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
) -> tuple[Int64Array, Int64Array]:
    if len(src_blocks) != len(dst_blocks):
        raise ValueError(
            f"group {group}: {len(src_blocks)} source blocks for {len(dst_blocks)} destinations"
        )
    sources = np.asarray(src_blocks, np.int64)
    targets = np.asarray(dst_blocks, np.int64)
    for side, blocks, limit in (("source", sources, src), ("destination", targets, dst)):
        if len(blocks) and (blocks.min() < 0 or blocks.max() >= limit.num_blocks):
            raise ValueError(f"group {group}: a {side} block is outside 0..{limit.num_blocks - 1}")
    order = np.argsort(sources, kind="stable")
    return sources[order], targets[order]


def _region_runs(src: Region, dst: Region, sources: Int64Array, targets: Int64Array) -> RegionRuns:
    if all(r.layer_stride_bytes == r.page_bytes for r in (src, dst)) and src.num_layers > 1:
        src, dst = _one_layer(src), _one_layer(dst)
    starts = np.ones(len(sources), np.bool_)
    if all(r.block_stride_bytes == r.page_bytes for r in (src, dst)):
        starts[1:] = (np.diff(sources) != 1) | (np.diff(targets) != 1)
    first = np.flatnonzero(starts)
    counts = np.diff(np.append(first, len(sources)))
    return RegionRuns(src, dst, sources[first], targets[first], counts)


def _one_layer(region: Region) -> Region:
    size = region.num_layers * region.page_bytes
    return msgspec.structs.replace(region, num_layers=1, page_bytes=size, layer_stride_bytes=size)


def _expand(runs: RegionRuns) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Return the byte ranges of every (layer, run)."""

    def starts(region: Region, blocks: Int64Array) -> Int64Array:
        layers = np.arange(region.num_layers, dtype=np.int64) * region.layer_stride_bytes
        offsets = region.offset_bytes + blocks * region.block_stride_bytes
        return (layers[:, None] + offsets[None, :]).ravel()

    sizes = np.tile(runs.counts * runs.src.page_bytes, runs.src.num_layers)
    return starts(runs.src, runs.src_blocks), starts(runs.dst, runs.dst_blocks), sizes


def _merge(
    src: Int64Array, dst: Int64Array, sizes: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Sort ranges by source and join those that touch on both sides."""
    order = np.argsort(src, kind="stable")
    src, dst, sizes = src[order], dst[order], sizes[order]
    starts = np.ones(len(src), np.bool_)
    starts[1:] = (src[:-1] + sizes[:-1] != src[1:]) | (dst[:-1] + sizes[:-1] != dst[1:])
    first = np.flatnonzero(starts)
    return src[first], dst[first], np.add.reduceat(sizes, first)
