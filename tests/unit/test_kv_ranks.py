"""Pulls of a worker with several ranks: each rank its part, all of them or none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch

from tests.unit.kv_box import ExporterProcess, Results, geometry, random_bytes
from tinfer.worker.kv.geometry import Geometry
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.puller import Pull, Puller, PullResult
from tinfer.worker.kv.rank_results import RankResults
from tinfer.worker.kv.shm_transport import ShmTransport
from tinfer.worker.kv.source import SourceBlocks

LAYOUT = geometry(num_blocks=8, num_layers=2, page_bytes=1024)
BLOCKS = ((1, 2, 5),)


def _of_rank(rank: int, size: int) -> Geometry:
    return msgspec.structs.replace(LAYOUT, tp_size=size, tp_rank=rank)


class RankReader:
    """One rank of a decode worker."""

    def __init__(self, rank: int, size: int) -> None:
        self.memory = torch.zeros(LAYOUT.total_bytes, dtype=torch.int8)
        self.results = Results()
        self.puller = Puller(
            ShmTransport(), self.memory, _of_rank(rank, size), self.results.wake, rank=rank
        )

    def pull(self, lease: LeaseRef) -> PullResult:
        self.puller.submit(Pull("r", "p", 1, lease, SourceBlocks(BLOCKS), BLOCKS))
        return self.results.next(self.puller)


@pytest.fixture
def owner() -> Iterator[ExporterProcess]:
    """The first rank's memory of a prefill worker of two, and its worker's leases."""
    process = ExporterProcess(_of_rank(0, 2), seed=1)
    yield process
    process.close()


def _reader(rank: int, size: int, owner: ExporterProcess) -> RankReader:
    """A reader that was told of the owner's rank of the same number, as far as there is one."""
    reader = RankReader(rank, size)
    theirs = _of_rank(min(rank, 1), 2)
    reader.puller.add_peer(msgspec.structs.replace(owner.peer(), geometry=theirs))
    return reader


def test_a_lease_ends_when_the_last_rank_has_stopped(owner: ExporterProcess) -> None:
    readers = [_reader(rank, 2, owner) for rank in (0, 1)]
    try:
        lease = owner.open_lease(num_readers=2)
        assert readers[1].pull(lease).ok
        assert owner.ended() == []
        assert readers[0].pull(lease).ok
        assert owner.ended() == [lease]
        wanted = random_bytes(LAYOUT.total_bytes, 1).reshape(2, 8, 1024)[:, BLOCKS[0]]
        for reader in readers:
            copied = reader.memory.numpy().reshape(2, 8, 1024)[:, BLOCKS[0]]
            assert np.array_equal(copied, wanted)
    finally:
        for reader in readers:
            reader.puller.close()


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 4), (3, 4)])
def test_another_number_of_ranks_is_refused_and_the_lease_ends_for_all_of_them(
    owner: ExporterProcess, rank: int, size: int
) -> None:
    """A reader of one rank must not leave the owner waiting for the second."""
    reader = _reader(rank, size, owner)
    try:
        lease = owner.open_lease(num_readers=2)
        result = reader.pull(lease)
        assert not result.ok
        assert f"KV geometry differs in tp_size: {size} here, 2 at the peer" in result.reason
        assert owner.ended() == [lease]
        assert not reader.memory.any()
    finally:
        reader.puller.close()


def test_a_rank_does_not_read_another_rank(owner: ExporterProcess) -> None:
    reader = RankReader(1, 2)
    reader.puller.add_peer(owner.peer())
    try:
        result = reader.pull(owner.open_lease(num_readers=2))
        assert not result.ok and "tp_rank: 1 here, 0 at the peer" in result.reason
    finally:
        reader.puller.close()


PARTS = (
    PullResult("r", True, "", 100, 50, 90),
    PullResult("r", True, "", 101, 40, 70),
    PullResult("r", True, "", 102, 60, 95),
)


@pytest.mark.parametrize("parts", list(itertools.permutations(PARTS)))
def test_a_pull_is_over_with_its_last_part(parts: tuple[PullResult, ...]) -> None:
    results = RankResults(3)
    assert [results.add(part) for part in parts[:2]] == [None, None]
    assert results.add(parts[2]) == PullResult("r", True, "", 303, 40, 95)


@pytest.mark.parametrize("number", range(3))
def test_one_failed_part_fails_the_pull(number: int) -> None:
    results = RankResults(3)
    failed = PullResult("r", False, "PeerGone: no worker p", 0, 55, 56)
    parts = [*PARTS[:number], failed, *PARTS[number + 1 :]]
    whole = [results.add(part) for part in parts][-1]
    assert whole is not None
    assert (whole.ok, whole.reason) == (False, "PeerGone: no worker p")
    assert whole.num_bytes == sum(part.num_bytes for part in parts)


def test_a_worker_of_one_rank_has_the_result_at_once() -> None:
    assert RankResults(1).add(PARTS[0]) == PARTS[0]
