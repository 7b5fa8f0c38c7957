"""Whatever the layout and the blocks, a plan moves exactly the pages the formula names."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kv_box import geometry, naive_copy, random_bytes
from tinfer.worker.kv.device_copy import DeviceCopier, row_index, runs_of
from tinfer.worker.kv.geometry import Geometry, Region, copy_plan
from tinfer.worker.kv.shm_transport import copy_runs
from tinfer.worker.kv.source import StagedSource, staging_geometry

Blocks = list[list[int]]
Case = tuple[Geometry, Geometry, Blocks, Blocks]


@st.composite
def cases(draw: st.DrawFn, page_unit: int = 8) -> Case:
    """Two geometries with the same shapes and different placements, and blocks to copy."""
    num_groups = draw(st.integers(1, 2))
    shapes = [
        (draw(st.integers(1, 4)), page_unit * draw(st.integers(1, 6)), group)
        for group in [
            *range(num_groups),
            *draw(st.lists(st.integers(0, num_groups - 1), max_size=1)),
        ]
    ]
    src, dst = draw(placed(shapes, page_unit)), draw(placed(shapes, page_unit))
    src_blocks: Blocks = []
    dst_blocks: Blocks = []
    for _ in range(num_groups):
        count = draw(st.integers(0, min(src.num_blocks, dst.num_blocks)))
        for lists, side in ((src_blocks, src), (dst_blocks, dst)):
            order = draw(st.permutations(range(side.num_blocks)))
            start = draw(st.integers(0, side.num_blocks - count))
            contiguous = list(range(start, start + count))
            lists.append(contiguous if draw(st.booleans()) else list(order[:count]))
    return src, dst, src_blocks, dst_blocks


@st.composite
def placed(draw: st.DrawFn, shapes: list[tuple[int, int, int]], unit: int) -> Geometry:
    """Regions one after another, or interleaved per block, with gaps."""
    num_blocks = draw(st.integers(1, 9))
    gap = unit * draw(st.integers(0, 2))
    regions, at = [], gap
    if draw(st.booleans()):
        for layers, page, group in shapes:
            layer_stride = page * num_blocks + gap
            regions.append(Region(at, layers, layer_stride, page, page, group))
            at += layers * layer_stride
        total = at
    else:
        block = sum(layers * page for layers, page, _ in shapes) + gap
        for layers, page, group in shapes:
            regions.append(Region(at, layers, page, block, page, group))
            at += layers * page
        total = gap + block * num_blocks
    return Geometry("x", "bf16", 16, num_blocks, total, "m", 1, 0, tuple(regions))


@given(cases())
def test_every_way_to_carry_out_a_plan_copies_what_the_formula_says(case: Case) -> None:
    src, dst, src_blocks, dst_blocks = case
    source, target = random_bytes(src.total_bytes, 1), random_bytes(dst.total_bytes, 2)
    expected = naive_copy(src, dst, src_blocks, dst_blocks, source, target)
    plan = copy_plan(src, dst, src_blocks, dst_blocks)

    by_runs = target.copy()
    copy_runs(plan, source, by_runs)
    assert np.array_equal(by_runs, expected)

    by_ranges = target.copy()
    for i, j, size in zip(*(column.tolist() for column in plan.ranges), strict=True):
        by_ranges[j : j + size] = source[i : i + size]
    assert np.array_equal(by_ranges, expected)
    assert plan.num_bytes == plan.sizes.sum()


@given(cases())
def test_ranges_are_sorted_and_maximal(case: Case) -> None:
    plan = copy_plan(*case)
    src_ends, dst_ends = plan.src_offsets + plan.sizes, plan.dst_offsets + plan.sizes
    assert (plan.src_offsets[1:] >= src_ends[:-1]).all(), "sorted, no byte twice"
    touching = (plan.src_offsets[1:] == src_ends[:-1]) & (plan.dst_offsets[1:] == dst_ends[:-1])
    assert not touching.any()


@settings(max_examples=50)
@given(cases(page_unit=512), st.sampled_from(["gather", "loop"]))
def test_device_copies_agree_with_the_formula(case: Case, strategy: str) -> None:
    src, dst, src_blocks, dst_blocks = case
    source, target = random_bytes(src.total_bytes, 3), random_bytes(dst.total_bytes, 4)
    expected = naive_copy(src, dst, src_blocks, dst_blocks, source, target)
    plan = copy_plan(src, dst, src_blocks, dst_blocks)
    assert plan.num_bytes == 0 or row_index(plan) is not None
    copier = DeviceCopier(torch.device("cpu"), strategy=strategy)  # type: ignore[arg-type]
    for copy in (copier.copy, copier.copy_in, copier.start_copy_out):
        result = torch.from_numpy(target.copy())
        copy(torch.from_numpy(source), result, plan)
        assert np.array_equal(result.numpy(), expected)


@settings(max_examples=50)
@given(cases(page_unit=512))
def test_staging_and_reading_back_is_a_direct_copy(case: Case) -> None:
    src, dst, src_blocks, dst_blocks = case
    source, target = random_bytes(src.total_bytes, 5), random_bytes(dst.total_bytes, 6)
    pool = staging_geometry(src, 20)
    slots = StagedSource(20).prepare(src_blocks).blocks
    staged = np.zeros(pool.total_bytes, np.int8)
    copy_runs(copy_plan(src, pool, src_blocks, slots), source, staged)
    copy_runs(copy_plan(pool, dst, slots, dst_blocks), staged, target)
    again = random_bytes(dst.total_bytes, 6)
    assert np.array_equal(target, naive_copy(src, dst, src_blocks, dst_blocks, source, again))


@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_cover_rows_in_order(rows: list[int]) -> None:
    covered = [
        (at + i, row + i)
        for at, row, count in runs_of(np.array(rows, np.int64))
        for i in range(count)
    ]
    assert covered == list(enumerate(rows))


@given(st.integers(0, 2**62), st.sampled_from(["offset_bytes", "layer_stride_bytes"]))
def test_no_geometry_reaches_outside_its_buffer(value: int, field: str) -> None:
    good = geometry(num_blocks=4, num_layers=2, page_bytes=16, tail_bytes=64)
    region = msgspec.structs.replace(good.regions[0], **{field: value})
    end = region.offset_bytes + region.layer_stride_bytes + 3 * region.block_stride_bytes + 16
    if end <= good.total_bytes:
        msgspec.structs.replace(good, regions=(region,))
    else:
        with pytest.raises(ValueError, match="reaches beyond"):
            msgspec.structs.replace(good, regions=(region,))
