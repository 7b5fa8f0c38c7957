"""What a request pulls into which blocks, asked of our side of vLLM's hooks without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tinfer.wire.messages import LeaseId, PullDone, Source, WorkerStats
from tinfer.worker.engine_scheduler import _starts_pull
from tinfer.worker.handoff_scheduler import SchedulerSide
from tinfer.worker.kv.source import SourceBlocks

BLOCK_TOKENS = 4


def source(num_tokens: int) -> Source:
    """Blocks 100, 101, … of another worker."""
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    blocks = SourceBlocks((tuple(range(100, 100 + num_blocks)),))
    lease = LeaseId(3, 1)
    return Source("p", 1, lease, num_tokens, num_blocks, msgspec.msgpack.encode(blocks))


def request(num_tokens: int, offered: Source) -> Any:
    transfer = {"do_remote_prefill": True, "source": offered}
    return SimpleNamespace(
        request_id="r-suffix",
        num_tokens=num_tokens,
        kv_transfer_params=transfer,
        skip_reading_prefix_cache=False,
    )


@pytest.fixture
def side() -> Iterator[SchedulerSide]:
    extra = {"worker_id": "d", "generation": 1, "lease_ttl_s": 9.0, "transport": "shm"}
    config: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(block_size=BLOCK_TOKENS),
    )
    cache: Any = SimpleNamespace(num_blocks=8, select_transfer_block_ids=tuple)
    made = SchedulerSide(config, cache)
    yield made
    made.close()


def pulled(side: SchedulerSide, wanted: Any, num_here: int) -> list[tuple[int, int]]:
    """Pairs of a block there and the one here that it is copied to, of which the first `num_here`
    are in the prefix cache: their own are 200, 201, …"""
    num_computed = num_here * BLOCK_TOKENS
    num_external, is_async = side.num_pullable_tokens(wanted, num_computed)
    assert is_async
    num_blocks = -(-(num_computed + num_external) // BLOCK_TOKENS)
    new = list(range(200 + num_here, 200 + num_blocks))
    blocks: Any = SimpleNamespace(get_unhashed_block_ids_all_groups=lambda: [new])
    side.blocks_allocated(wanted, blocks, num_external)
    (pull,) = side.build_metadata().pulls
    return list(zip(pull.source.blocks[0], pull.dst_blocks[0], strict=True))


def test_each_block_is_copied_to_its_own_place(side: SchedulerSide) -> None:
    whole = pulled(side, request(10, source(10)), num_here=0)
    assert whole == [(100, 200), (101, 201), (102, 202)]
    rest = pulled(side, request(10, source(10)), num_here=2)
    assert rest == [(102, 202)]


@pytest.mark.parametrize("num_here", [0, 1])
def test_a_source_that_has_more_tokens_gives_the_first_of_its_blocks(
    side: SchedulerSide, num_here: int
) -> None:
    """A request that is preempted while it computes its prompt, since its first pull failed, has
    nothing of its answer yet; what is prefilled for it has the first token, and at the end of a
    block that is one block more."""
    found = pulled(side, request(8, source(9)), num_here)
    assert found == [(100, 200), (101, 201)][num_here:]


def test_who_may_read_no_cache_starts_no_pull(side: SchedulerSide) -> None:
    """vLLM computes all of its tokens, so they have to come out of the step's prompt tokens."""
    wanted = request(8, source(8))
    assert _starts_pull(wanted)
    wanted.skip_reading_prefix_cache = True
    assert not _starts_pull(wanted)
    nothing: Any = SimpleNamespace()
    side.blocks_allocated(wanted, nothing, 0)
    assert side.build_metadata().unused
    (notice,) = side.take_notices(WorkerStats)
    assert isinstance(notice, PullDone) and notice.request_id == "r"
