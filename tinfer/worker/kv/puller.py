"""The reader's side of a hand-off: one thread that copies blocks from peers, in order.

The engine's thread submits pulls and polls results; it never waits here. This module owns the
invariants that every submitted pull yields exactly one result, that a result is good only if the
lease was valid before and after the copy, and that the lease is marked done whatever happened, so
that the owner may free its blocks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from tinfer.worker.kv.errors import KVError, PeerGone
from tinfer.worker.kv.geometry import Geometry, check_compatible, copy_plan
from tinfer.worker.kv.lease import LeaseRef, LeaseTable, LeaseView
from tinfer.worker.kv.shm import ShmDescriptor, process_alive
from tinfer.worker.kv.source import SourceBlocks
from tinfer.worker.kv.transport import Export, PeerMemory, Transport

DEFAULT_MAX_PENDING = 4096  # as many as a lease table has slots
_READY_POLL_S = 0.0005

PeerKey = tuple[str, int]


class PeerInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker publishes so that others can pull from it; one per rank."""

    worker_id: str
    generation: int
    export: Export
    geometry: Geometry
    lease_table: ShmDescriptor


class Pull(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request's blocks: copy `source` at the peer to `dst_blocks` here, group by group."""

    request_id: str
    worker_id: str
    generation: int
    lease: LeaseRef
    source: SourceBlocks
    dst_blocks: tuple[tuple[int, ...], ...]


class PullResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a pull ended; `reason` says why when not `ok`. Times are on the monotonic clock."""

    request_id: str
    ok: bool
    reason: str
    num_bytes: int
    started_ns: int
    finished_ns: int


@dataclass(frozen=True)
class _Queued:
    pull: Pull
    after: torch.cuda.Event | None


@dataclass(frozen=True)
class _Unused:
    key: PeerKey
    lease: LeaseRef


@dataclass(frozen=True)
class _Drop:
    key: PeerKey


_Task = _Queued | _Unused | _Drop | PeerInfo


class StaleLease(KVError):
    """The lease ended before or during the copy: its blocks may hold anything."""


class _Peer:
    """A peer known to the puller's thread; its memory is mapped at the first pull."""

    def __init__(self, info: PeerInfo) -> None:
        self.info = info
        self.memory: PeerMemory | None = None
        self._leases: LeaseView | None = None

    def leases(self) -> LeaseView:
        if self._leases is None:
            self._leases = LeaseTable.attach(self.info.lease_table)
        return self._leases

    def is_alive(self) -> bool:
        table = self.info.lease_table
        return process_alive(table.pid, table.start_time_ticks)

    def close(self, transport: Transport) -> None:
        if self.memory is not None:
            transport.unmap(self.memory)
            self.memory = None
        if self._leases is not None:
            self._leases.close()
            self._leases = None


class Puller:
    """Copies blocks from peers into `dst_tensor` (int8, shape [geometry.total_bytes] or more).

    `rank` is this worker's rank among the lease's readers. `wake` is called after each result,
    mostly from the puller's thread, and must not raise. All public methods may be called from any
    thread; none of them waits for a copy except `close`.
    """

    def __init__(
        self,
        transport: Transport,
        dst_tensor: torch.Tensor,
        geometry: Geometry,
        wake: Callable[[], None],
        *,
        rank: int = 0,
        max_pending: int = DEFAULT_MAX_PENDING,
    ) -> None:
        self._transport = transport
        self._dst = dst_tensor
        self._geometry = geometry
        self._wake = wake
        self._rank = rank
        self._max_pending = max_pending
        self._lock = threading.Condition()
        # Guarded by the lock.
        self._tasks: deque[_Task] = deque()
        self._unready: deque[_Queued] = deque()
        self._num_pending = 0
        self._results: deque[PullResult] = deque()
        self._closing = False
        self._num_mapped = 0
        self._num_stale = 0
        # The thread's own.
        self._peers: dict[PeerKey, _Peer] = {}
        self._thread = threading.Thread(target=self._run, name="kv-puller", daemon=True)
        self._thread.start()

    @property
    def num_mapped(self) -> int:
        """Return the number of peers whose memory is mapped."""
        return self._num_mapped

    @property
    def num_stale(self) -> int:
        """Return the number of peers that were dropped and are not yet unmapped."""
        return self._num_stale

    @property
    def num_pending(self) -> int:
        """Return the number of pulls submitted and without a result."""
        return self._num_pending

    def add_peer(self, info: PeerInfo) -> None:
        """Make a peer known; an older generation of the same worker is dropped."""
        self._put(info)

    def drop_peer(self, worker_id: str, generation: int) -> None:
        """Forget a peer and unmap it, after the pulls submitted before this call."""
        with self._lock:
            self._num_stale += 1
            self._tasks.append(_Drop((worker_id, generation)))
            self._lock.notify()

    def submit(self, pull: Pull) -> None:
        """Queue a pull; its result comes from `poll`.

        Called on the engine's thread: on a GPU the copy waits for the work queued there so far,
        which may still use the destination blocks. With `max_pending` pulls queued the pull fails
        at once and its lease is marked done; after `close` it fails, and its lease is left to the
        supervisor.
        """
        after = self._transport.fence()
        with self._lock:
            self._num_pending += 1
            refused = ""
            if self._closing:
                refused = "the puller is closed"
            elif self._num_pending > self._max_pending:
                refused = f"{self._max_pending} pulls are pending already"
            else:
                self._tasks.append(_Queued(pull, after))
                self._lock.notify()
        if refused:
            self._refuse(pull, refused)

    def notify_unused(self, worker_id: str, generation: int, lease: LeaseRef) -> None:
        """Mark a lease done without copying."""
        self._put(_Unused((worker_id, generation), lease))

    def cancel(self, request_id: str) -> None:
        """Fail a pull that has not started; one that runs ends as it would have."""
        with self._lock:
            queue = next(
                (
                    (tasks, task)
                    for tasks in (self._tasks, self._unready)
                    for task in tasks
                    if isinstance(task, _Queued) and task.pull.request_id == request_id
                ),
                None,
            )
            if queue is None:
                return
            tasks, task = queue
            tasks.remove(task)
        self._refuse(task.pull, "cancelled")

    def poll(self) -> list[PullResult]:
        """Return the results since the last call, in the order in which the pulls ended."""
        with self._lock:
            results = list(self._results)
            self._results.clear()
        return results

    def close(self) -> None:
        """End the thread after the copy that runs; pulls still queued fail; peers are unmapped."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (task := self._take()) is not None:
                self._do(task)
        finally:
            self._shut_down()

    def _take(self) -> _Task | None:
        """Wait for the next task; None when closing.

        Pulls whose bytes are not staged yet stand aside and are looked at again.
        """
        with self._lock:
            while True:
                if self._closing:
                    return None
                if self._tasks:
                    return self._tasks.popleft()
                if self._lock.wait(_READY_POLL_S if self._unready else None) or not self._unready:
                    continue
                self._tasks.extend(self._unready)
                self._unready.clear()

    def _do(self, task: _Task) -> None:
        if isinstance(task, PeerInfo):
            self._add(task)
        elif isinstance(task, _Drop):
            self._forget(task.key)
            with self._lock:
                self._num_stale -= 1
        elif isinstance(task, _Unused):
            self._end_lease(task.key, task.lease)
        else:
            self._pull(task)

    def _pull(self, task: _Queued) -> None:
        pull = task.pull
        started_ns = time.monotonic_ns()
        num_bytes = 0
        reason: str | None = "the puller broke"  # stands if a defect ends the thread
        try:
            peer = self._known(pull)
            if not self._is_ready(peer, pull):
                reason = None
                with self._lock:
                    self._unready.append(task)
                return
            num_bytes = self._copy(peer, task)
            reason = ""
        except (KVError, RuntimeError, OSError, ValueError) as error:
            # Whatever a mapping or a copy raises, the answer is the same: the request's blocks
            # are recomputed. What is not in this list is a defect and ends the thread.
            reason = f"{type(error).__name__}: {error}"
        finally:
            if reason is not None:
                self._end_lease(_key(pull), pull.lease)
                finished_ns = time.monotonic_ns()
                self._finish(
                    PullResult(
                        pull.request_id, not reason, reason, num_bytes, started_ns, finished_ns
                    )
                )

    def _known(self, pull: Pull) -> _Peer:
        peer = self._peers.get(_key(pull))
        if peer is None:
            raise PeerGone(f"no worker {pull.worker_id} of generation {pull.generation}")
        if peer.memory is None:
            check_compatible(self._geometry, peer.info.geometry)
        return peer

    def _is_ready(self, peer: _Peer, pull: Pull) -> bool:
        """Tell whether the copy may start; raise if it never may."""
        leases = peer.leases()
        if leases.is_ready(pull.lease, self._rank):
            return True
        deadline_s = leases.deadline_s(pull.lease)
        if deadline_s is None:
            raise StaleLease("the lease had ended before the copy")
        if not peer.is_alive():
            raise PeerGone(f"worker {pull.worker_id} died before the blocks were staged")
        if deadline_s < time.monotonic():
            raise StaleLease("the lease's deadline passed before the blocks were staged")
        return False

    def _copy(self, peer: _Peer, task: _Queued) -> int:
        if peer.memory is None:
            peer.memory = self._transport.map(peer.info.export, peer.info.geometry)
            self._num_mapped += 1
        pull = task.pull
        source = peer.memory.geometry
        plan = copy_plan(source, self._geometry, pull.source.blocks, pull.dst_blocks)
        self._transport.copy(peer.memory, plan, self._dst, task.after)
        if not peer.leases().is_valid(pull.lease):
            raise StaleLease("the lease ended during the copy")
        if not peer.memory.is_trusted():
            raise PeerGone(f"worker {pull.worker_id} died during the copy")
        return plan.num_bytes

    def _end_lease(self, key: PeerKey, lease: LeaseRef) -> None:
        peer = self._peers.get(key)
        if peer is None:
            return
        try:
            if peer.info.geometry.tp_size == self._geometry.tp_size:
                peer.leases().mark_done(lease, self._rank)
            else:
                # The owner waits for as many ranks as it has itself, and none here can read it.
                peer.leases().release(lease)
        except PeerGone:
            return  # its leases died with it

    def _add(self, info: PeerInfo) -> None:
        for worker_id, generation in list(self._peers):
            if worker_id == info.worker_id and generation <= info.generation:
                self._forget((worker_id, generation))
        self._peers[info.worker_id, info.generation] = _Peer(info)

    def _forget(self, key: PeerKey) -> None:
        peer = self._peers.get(key)
        if peer is None:
            return
        with self._lock:
            waiting = [task for task in self._unready if _key(task.pull) == key]
            for task in waiting:
                self._unready.remove(task)
        for task in waiting:
            self._give_up(task.pull, "the peer was dropped before the blocks were staged")
        del self._peers[key]
        self._num_mapped -= peer.memory is not None
        peer.close(self._transport)

    def _give_up(self, pull: Pull, reason: str) -> None:
        """Fail a pull on the puller's thread, and let its lease go."""
        self._end_lease(_key(pull), pull.lease)
        self._fail(pull, reason)

    def _shut_down(self) -> None:
        """Answer what is still queued and unmap everything; also when the thread breaks."""
        with self._lock:
            self._closing = True
            tasks: list[_Task] = [*self._unready, *self._tasks]
            self._tasks.clear()
            self._unready.clear()
        for task in tasks:
            if isinstance(task, _Queued):
                self._give_up(task.pull, "the puller was closed")
            else:
                self._do(task)
        for key in list(self._peers):
            self._forget(key)

    # --- both sides ---------------------------------------------------------------------------

    def _put(self, task: _Task) -> None:
        with self._lock:
            self._tasks.append(task)
            self._lock.notify()

    def _refuse(self, pull: Pull, reason: str) -> None:
        """Fail a pull that will not start, and let its lease go."""
        self._put(_Unused(_key(pull), pull.lease))
        self._fail(pull, reason)

    def _fail(self, pull: Pull, reason: str) -> None:
        now_ns = time.monotonic_ns()
        self._finish(PullResult(pull.request_id, False, reason, 0, now_ns, now_ns))

    def _finish(self, result: PullResult) -> None:
        with self._lock:
            self._num_pending -= 1
            self._results.append(result)
        self._wake()


def _key(pull: Pull) -> PeerKey:
    return pull.worker_id, pull.generation
