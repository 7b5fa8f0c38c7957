"""What geometries refuse, and what a plan looks like in the layouts that vLLM uses."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.kv_box import geometry
from tinfer.worker.kv.errors import GeometryMismatch
from tinfer.worker.kv.geometry import Geometry, check_compatible, copy_plan


def test_placement_may_differ() -> None:
    check_compatible(geometry(num_blocks=4), geometry(num_blocks=9, offset_bytes=64, tail_bytes=7))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", "other"),
        ("dtype", "fp8"),
        ("block_tokens", 32),
        ("model_hash", "n"),
        ("tp_size", 2),
        ("tp_rank", 1),
    ],
)
def test_a_field_that_must_agree_is_named(field: str, value: object) -> None:
    mine = geometry()
    with pytest.raises(GeometryMismatch, match=field) as caught:
        check_compatible(mine, msgspec.structs.replace(mine, **{field: value}))
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "value"), [("num_layers", 2), ("page_bytes", 8), ("group", 1)])
def test_a_region_that_differs_is_named(field: str, value: int) -> None:
    mine = geometry()
    region = msgspec.structs.replace(mine.regions[0], **{field: value})
    with pytest.raises(GeometryMismatch) as caught:
        check_compatible(mine, msgspec.structs.replace(mine, regions=(region,)))
    assert caught.value.field == f"regions[0].{field}"


def test_the_number_of_regions_must_agree() -> None:
    mine = geometry()
    with pytest.raises(GeometryMismatch, match="num_regions"):
        check_compatible(mine, msgspec.structs.replace(mine, regions=mine.regions * 2))


def test_a_geometry_survives_the_wire_and_unknown_fields_do_not() -> None:
    mine = geometry()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(mine), type=Geometry) == mine
    more = {**msgspec.to_builtins(mine), "surprise": 1}
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.convert(more, Geometry)


def test_a_decoded_geometry_is_checked_too() -> None:
    bad = {**msgspec.to_builtins(geometry()), "total_bytes": 10}
    with pytest.raises(msgspec.ValidationError, match="reaches beyond 10 bytes"):
        msgspec.convert(bad, Geometry)


def test_a_run_of_blocks_is_one_range_per_layer_with_layers_outermost() -> None:
    src, dst = geometry(num_blocks=10, num_layers=3, page_bytes=8), geometry(12, 3, 8)
    plan = copy_plan(src, dst, [[4, 5, 6]], [[7, 8, 9]])
    assert plan.src_offsets.tolist() == [32, 80 + 32, 160 + 32]
    assert plan.dst_offsets.tolist() == [56, 96 + 56, 192 + 56]
    assert plan.sizes.tolist() == [24, 24, 24]


def test_a_run_of_blocks_is_one_range_with_blocks_outermost() -> None:
    src = geometry(10, 3, 8, block_outermost=True)
    plan = copy_plan(src, src, [[5, 4, 6]], [[1, 0, 2]])
    assert (plan.src_offsets.tolist(), plan.dst_offsets.tolist()) == ([96], [0])
    assert plan.sizes.tolist() == [72]


@pytest.mark.parametrize(
    ("src_blocks", "dst_blocks", "message"),
    [
        ([[0]], [[0, 1]], "1 source blocks for 2 destinations"),
        ([[0], [1]], [[0], [1]], "2 source and 2 destination block lists for 1 groups"),
        ([[16]], [[0]], "source block is outside 0..15"),
        ([[-1]], [[0]], "source block is outside"),
        ([[0]], [[16]], "destination block is outside"),
    ],
)
def test_bad_block_lists_are_refused(
    src_blocks: list[list[int]], dst_blocks: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        copy_plan(geometry(), geometry(), src_blocks, dst_blocks)


def test_nothing_to_copy_is_an_empty_plan() -> None:
    plan = copy_plan(geometry(), geometry(), [[]], [[]])
    assert plan.num_bytes == 0
    assert [len(column) for column in plan.ranges] == [0, 0, 0]
