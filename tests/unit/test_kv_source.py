"""Block sources: direct ones hand out the blocks, staged ones slots of a bounded pool."""

from __future__ import annotations

import pytest

from tests.unit.kv_box import geometry
from tinfer.worker.kv.errors import StagingFull
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.source import (
    DirectSource,
    StagedSource,
    block_source,
    staging_geometry,
    staging_slot_bytes,
)

LEASE = LeaseRef(slot=0, generation=1)


def test_a_direct_source_offers_the_blocks_and_orders_nothing() -> None:
    source = block_source("shm")
    assert isinstance(source, DirectSource) and not source.needs_staging
    offered = source.prepare([[3, 1], [2]])
    assert offered.blocks == ((3, 1), (2,))
    assert source.order(LEASE, [[3, 1], [2]], offered) is None
    source.finish(offered)


def test_slots_are_distinct_bounded_and_come_back() -> None:
    source = block_source("host", num_staging_slots=4)
    assert isinstance(source, StagedSource) and source.needs_staging
    first = source.prepare([[30, 31], [32]])
    assert len({slot for group in first.blocks for slot in group}) == 3
    order = source.order(LEASE, [[30, 31], [32]], first)
    assert order is not None
    assert (order.lease, order.blocks, order.slots) == (LEASE, ((30, 31), (32,)), first.blocks)

    with pytest.raises(StagingFull, match="2 blocks to stage, 1 of 4 slots free"):
        source.prepare([[1, 2]])
    assert source.num_used == 3, "a refusal takes nothing"
    last = source.prepare([[1]])
    assert not {s for g in first.blocks for s in g} & set(last.blocks[0])
    source.finish(first)
    source.finish(last)
    assert source.num_used == 0


def test_ranks_that_see_the_same_calls_use_the_same_slots() -> None:
    ranks = [StagedSource(5), StagedSource(5)]
    for rank in ranks:
        rank.finish(rank.prepare([[7, 8]]))
    assert len({rank.prepare([[1, 2, 3, 4, 5]]).blocks for rank in ranks}) == 1


def test_a_slot_holds_one_block_of_all_layers_without_gaps() -> None:
    layout = geometry(num_blocks=6, num_layers=3, page_bytes=512, offset_bytes=100)
    pool = staging_geometry(layout, 2)
    assert staging_slot_bytes(layout) == 1536
    assert (pool.total_bytes, pool.num_blocks) == (2 * 1536, 2)
    (region,) = pool.regions
    assert (region.offset_bytes, region.layer_stride_bytes, region.block_stride_bytes) == (
        0,
        512,
        1536,
    )
