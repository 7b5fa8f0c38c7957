"""The reader's side of the fake engine's hand-off: peers, their mappings, and the pulls from them.

A pull copies half of its blocks when it starts and half when its modelled time is over, and checks
the lease before and after, so that what may go wrong within a copy can go wrong here too. It then
compares every block with what the request's tokens say. It marks its lease done once, however it
ended.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from tinfer.wire.messages import Source, decode_opaque, shown
from tinfer.worker.fake_kv import FakeBlocks, FakeExport, FakeKV
from tinfer.worker.fake_model import DIGEST_BYTES
from tinfer.worker.fake_settings import FakeSettings
from tinfer.worker.fake_timer import AlarmFd, Pace
from tinfer.worker.kv.errors import GeometryMismatch, KVError, PeerGone
from tinfer.worker.kv.lease import LeaseRef, LeaseTable, LeaseView
from tinfer.worker.kv.shm import attach_mmap, close_mmap

log = logging.getLogger(__name__)

Owner = TypeVar("Owner")


class PullFailed(KVError):
    """A pull cannot go on; its request is computed here instead."""


class FakePeer:
    """Another fake worker's memory, mapped when it is first needed."""

    def __init__(self, name: str, export: FakeExport) -> None:
        self.name = name
        self.num_pulls = 0
        self._export = export
        self._leases: LeaseView | None = None
        self._kv: mmap.mmap | None = None

    @property
    def is_mapped(self) -> bool:
        return self._kv is not None

    def leases(self) -> LeaseView:
        """Raises `PeerGone`."""
        if self._leases is None:
            self._leases = LeaseTable.attach(self._export.leases)
        return self._leases

    def map(self, block_tokens: int) -> None:
        """Raises `PeerGone`, or `GeometryMismatch` if the peer's blocks are of another size."""
        if self._export.block_tokens != block_tokens:
            raise GeometryMismatch("block_tokens", block_tokens, self._export.block_tokens)
        if self._kv is None:
            self._kv = attach_mmap(self._export.kv)

    def read(self, block: int) -> bytes:
        assert self._kv is not None, "mapped when the pull started"
        digest = self._kv[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
        if len(digest) != DIGEST_BYTES:
            raise PullFailed(f"worker {self.name} has no block {block}")
        return digest

    def close(self) -> None:
        if self._leases is not None:
            self._leases.close()
        if self._kv is not None:
            close_mmap(self._kv)
        self._leases = self._kv = None


@dataclass
class _Pull(Generic[Owner]):
    owner: Owner
    source: Source
    peer: FakePeer | None
    digests: list[bytes]
    pairs: list[tuple[int, int]]
    submitted_s: float
    started_s: float = 0.0
    due_s: float | None = None  # None until it has started
    failure: str = ""
    is_wrong: bool = False


@dataclass
class PullResult(Generic[Owner]):
    """How a pull ended. `is_wrong`: the lease was valid throughout, and yet the bytes were not the
    request's, which a real engine would not have noticed."""

    owner: Owner
    failure: str
    is_wrong: bool
    num_bytes: int
    copy_s: float
    handoff_s: float


class Pulls(Generic[Owner]):
    """All pulls of one engine, one after the other; `alarm` goes off when the first one ends.

    Nothing here runs by itself: `advance` starts and ends what is due.
    """

    def __init__(
        self, kv: FakeKV, settings: FakeSettings, pace: Pace, rng: random.Random, alarm: AlarmFd
    ) -> None:
        self._kv = kv
        self._block_tokens = settings.block_tokens
        self._fail_rate = settings.fail_pull_rate
        self._pace = pace
        self._rng = rng
        self._alarm = alarm
        self._peers: dict[tuple[str, int], FakePeer] = {}
        self._dropped: list[FakePeer] = []
        self._queue: deque[_Pull[Owner]] = deque()
        self._free_from_s = 0.0
        self._results: list[PullResult[Owner]] = []

    # --- peers --------------------------------------------------------------------------------

    @property
    def num_mapped(self) -> int:
        return sum(peer.is_mapped for peer in [*self._peers.values(), *self._dropped])

    @property
    def num_stale(self) -> int:
        """Peers that are gone, but for whose memory a pull still waits."""
        return len(self._dropped)

    def add_peer(self, worker_id: str, generation: int, export: bytes) -> None:
        """Make a peer known; an older generation of the same worker is dropped.

        One whose export cannot be read stays unknown, and pulls from it fail.
        """
        for known in [k for k in self._peers if k[0] == worker_id and k[1] <= generation]:
            self.drop_peer(*known)
        try:
            decoded = decode_opaque(FakeExport, export)
        except msgspec.DecodeError as error:
            log.warning("export of %.64a dropped: %s", worker_id, shown(error))
            return
        self._peers[worker_id, generation] = FakePeer(f"{worker_id}.{generation}", decoded)

    def drop_peer(self, worker_id: str, generation: int) -> None:
        """Forget a peer; its memory is unmapped after the pulls submitted before."""
        peer = self._peers.pop((worker_id, generation), None)
        if peer is not None:
            self._dropped.append(peer)
            self._close_dropped()

    def _close_dropped(self) -> None:
        for peer in [peer for peer in self._dropped if not peer.num_pulls]:
            self._dropped.remove(peer)
            peer.close()

    # --- pulls --------------------------------------------------------------------------------

    @property
    def next_end_s(self) -> float | None:
        """When the pull that runs ends, on the monotonic clock."""
        return self._queue[0].due_s if self._queue else None

    def __len__(self) -> int:
        """Pulls whose result has not been taken."""
        return len(self._queue) + len(self._results)

    def submit(self, owner: Owner, source: Source, blocks: list[int], digests: list[bytes]) -> None:
        """Fill `blocks`, which must come to hold `digests`, from the first blocks of a source."""
        peer = self._peers.get((source.worker_id, source.worker_generation))
        try:
            offered = decode_opaque(FakeBlocks, source.blocks).blocks
        except msgspec.DecodeError as error:
            log.warning("blocks of %.64a dropped: %s", source.worker_id, shown(error))
            offered = []
        # Fewer offered than wanted shows as blocks that do not hold what they should.
        pairs = list(zip(offered, blocks, strict=False))
        if peer is not None:
            peer.num_pulls += 1
        self._queue.append(_Pull(owner, source, peer, digests, pairs, time.monotonic()))

    def mark_unused(self, source: Source) -> None:
        """This engine will not read that source."""
        self._mark_done(self._peers.get((source.worker_id, source.worker_generation)), source)

    def cancel(self, owner: Owner) -> None:
        """Fail a pull that has not started; one that runs ends as it would have."""
        for pull in self._queue:
            if pull.owner is owner and pull.due_s is None:
                self._queue.remove(pull)
                pull.failure = "cancelled"
                self._end(pull, time.monotonic())
                return

    def advance(self) -> None:
        """Start and end what is due."""
        while self._queue:
            pull = self._queue[0]
            if pull.due_s is None:
                pull.started_s = max(pull.submitted_s, self._free_from_s)
                self._begin(pull)
                cost_s = 0.0 if pull.failure else self._pace.pull_s(len(pull.pairs))
                pull.due_s = pull.started_s + cost_s
                self._alarm.set(pull.due_s)
            if pull.due_s > time.monotonic():
                return
            self._queue.popleft()
            self._free_from_s = pull.due_s
            self._end(pull, pull.due_s)

    def take_results(self) -> list[PullResult[Owner]]:
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        """Let go of every lease and every mapping."""
        for pull in self._queue:
            self._mark_done(pull.peer, pull.source)
        self._queue.clear()
        for peer in [*self._peers.values(), *self._dropped]:
            peer.close()
        self._peers.clear()
        self._dropped.clear()

    # --- one pull -----------------------------------------------------------------------------

    def _begin(self, pull: _Pull[Owner]) -> None:
        try:
            if pull.peer is None:
                source = pull.source
                raise PullFailed(
                    f"no worker {source.worker_id} of generation {source.worker_generation}"
                )
            pull.peer.map(self._block_tokens)
            if not pull.peer.leases().is_valid(_ref(pull.source)):
                raise PullFailed("the lease had ended before the copy")
            if self._rng.random() < self._fail_rate:
                raise PullFailed("fail_pull_rate")
            self._copy(pull.peer, pull.pairs[: len(pull.pairs) // 2])
        except KVError as error:
            pull.failure = str(error)

    def _end(self, pull: _Pull[Owner], ended_s: float) -> None:
        peer = pull.peer
        if not pull.failure and peer is not None:
            try:
                self._finish(pull, peer)
            except KVError as error:
                pull.failure = str(error)
        self._mark_done(peer, pull.source)
        if peer is not None:
            peer.num_pulls -= 1
            self._close_dropped()
        self._results.append(
            PullResult(
                pull.owner,
                pull.failure,
                pull.is_wrong,
                0 if pull.failure else len(pull.pairs) * DIGEST_BYTES,
                max(0.0, ended_s - pull.started_s) if pull.due_s is not None else 0.0,
                ended_s - pull.submitted_s,
            )
        )

    def _finish(self, pull: _Pull[Owner], peer: FakePeer) -> None:
        self._copy(peer, pull.pairs[len(pull.pairs) // 2 :])
        if not peer.leases().is_valid(_ref(pull.source)):
            raise PullFailed("the lease ended during the copy")
        held = [self._kv.read(block) for _, block in pull.pairs]
        if held != pull.digests:
            pull.is_wrong = True
            raise PullFailed("the blocks under a valid lease are not the request's")

    def _copy(self, peer: FakePeer, pairs: list[tuple[int, int]]) -> None:
        for theirs, ours in pairs:
            self._kv.write(ours, peer.read(theirs))

    def _mark_done(self, peer: FakePeer | None, source: Source) -> None:
        if peer is not None:
            with contextlib.suppress(PeerGone):  # its leases died with it
                peer.leases().mark_done(_ref(source))


def _ref(source: Source) -> LeaseRef:
    return LeaseRef(source.lease.slot, source.lease.generation)
