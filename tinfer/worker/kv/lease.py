"""Leases on KV blocks, kept in memory that owner, reader and supervisor share.

A lease is the prefill side's promise to keep blocks until the reader has stopped. Each worker owns
one table of bounded slots in a memfd; peers map it once and need no message to check a lease or to
end it. The module owns two invariants: a slot never carries the same generation twice, and a
passed deadline by itself ends nothing, it is only reported.

Ordering. Every word is an aligned int64 written by a single 8-byte store, and no word has two
writers that need a read-modify-write: ranks have a word each, and a word says "done" by holding
the lease's generation, so a store that arrives late can never end the slot's next lease. The
generation is written last on opening and first on closing. On x86-64 that is sufficient: stores
become visible in order and loads are not reordered with loads. On aarch64 the reader's second
generation check could in principle be executed ahead of the last loads of its copy, but only
within the processor's reorder window (some hundred instructions), and the interpreter retires
thousands between the copy and the check; a copy by the GPU is ordered by its event. The owner's
side has an engine step between invalidating a row and anything that overwrites the blocks.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from tinfer.worker.kv.errors import LeaseNotOpen, LeaseTableFull
from tinfer.worker.kv.shm import ShmDescriptor, attach_mmap, close_mmap, create_memfd, describe

MAX_READERS = 8
DEFAULT_SLOTS = 4096

# Words of a row. DONE and READY are MAX_READERS words each, one per rank.
_GENERATION, _DEADLINE_NS, _RELEASED, _DONE = 0, 1, 2, 3
_READY = _DONE + MAX_READERS
_ROW_WORDS = _READY + MAX_READERS
_FREE = 0


class LeaseRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One lease: a slot of its owner's table, and the generation that makes it unique there."""

    slot: int
    generation: int


class _Rows:
    """The shared words; all access is by whole int64."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._view = memoryview(mapping)
        self.words = self._view.cast("q")
        self.num_slots = len(self.words) // _ROW_WORDS

    def holds(self, ref: LeaseRef) -> bool:
        """Tell whether the row still carries this lease."""
        if not 0 <= ref.slot < self.num_slots or ref.generation == _FREE:
            return False
        return self.words[ref.slot * _ROW_WORDS + _GENERATION] == ref.generation

    def close(self) -> None:
        self.words.release()
        self._view.release()
        close_mmap(self._mapping)


class LeaseView:
    """A peer's or supervisor's view of another process's lease table."""

    def __init__(self, descriptor: ShmDescriptor) -> None:
        self._rows = _Rows(attach_mmap(descriptor, writable=True))

    def is_valid(self, ref: LeaseRef) -> bool:
        """Tell whether the lease is still open, so that its blocks hold what they held."""
        return self._rows.holds(ref)

    def is_ready(self, ref: LeaseRef, rank: int = 0) -> bool:
        """Tell whether the rank's bytes are in place: at once, or once they are staged."""
        word = _READY + _checked(rank)
        return (
            self._rows.holds(ref)
            and self._rows.words[ref.slot * _ROW_WORDS + word] == ref.generation
        )

    def deadline_s(self, ref: LeaseRef) -> float | None:
        """Return the lease's deadline on the monotonic clock, None if the lease is not open."""
        if not self._rows.holds(ref):
            return None
        return self._rows.words[ref.slot * _ROW_WORDS + _DEADLINE_NS] / 1e9

    def mark_ready(self, ref: LeaseRef, rank: int = 0) -> None:
        """Publish that the rank's bytes are staged; no effect on a lease that is over."""
        self._put(ref, _READY + _checked(rank), ref.generation)

    def mark_done(self, ref: LeaseRef, rank: int = 0) -> None:
        """Say that the rank will not read again; no effect on a lease that is over."""
        self._put(ref, _DONE + _checked(rank), ref.generation)

    def release(self, ref: LeaseRef) -> None:
        """End the lease for all ranks: for a supervisor that saw the reader dead."""
        self._put(ref, _RELEASED, ref.generation)

    def extend(self, ref: LeaseRef, deadline_s: float) -> None:
        """Move the deadline, a time on the monotonic clock; no effect on a lease that is over."""
        # A store that loses the race against the slot's next lease moves that one's deadline,
        # which at worst reports it overdue early or late: deadlines free nothing.
        self._put(ref, _DEADLINE_NS, int(deadline_s * 1e9))

    def close(self) -> None:
        """Unmap the table."""
        self._rows.close()

    def _put(self, ref: LeaseRef, word: int, value: int) -> None:
        if self._rows.holds(ref):
            self._rows.words[ref.slot * _ROW_WORDS + word] = value


@dataclass
class _Open:
    ref: LeaseRef
    num_readers: int
    reported_deadline_ns: int | None = None
    ended: bool = False


class LeaseTable:
    """The owner's side: opens and closes leases, and sees readers end them.

    Not thread-safe: one thread of the owning process uses it.
    """

    def __init__(self, fd: int, mapping: mmap.mmap, clock_ns: Callable[[], int]) -> None:
        self._fd = fd
        self._rows = _Rows(mapping)
        self._clock_ns = clock_ns
        self._open: dict[int, _Open] = {}
        # First in, first out: the longer a slot rests, the less a confused peer can meet it again.
        self._free = deque(range(self._rows.num_slots))
        self._last_generation = _FREE

    @classmethod
    def create(
        cls, num_slots: int = DEFAULT_SLOTS, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> LeaseTable:
        """Create a table of `num_slots` leases in fresh shared memory.

        Raises:
            KVMemoryError: the memory cannot be reserved.
        """
        fd, mapping = create_memfd("leases", num_slots * _ROW_WORDS * 8)
        return cls(fd, mapping, clock_ns)

    @staticmethod
    def attach(descriptor: ShmDescriptor) -> LeaseView:
        """Map another process's table.

        Raises:
            PeerGone: that process, or its table, no longer exists.
        """
        return LeaseView(descriptor)

    def descriptor(self) -> ShmDescriptor:
        """Return what a peer needs to attach; valid while this table is open."""
        return describe(self._fd)

    @property
    def num_open(self) -> int:
        """Return the number of leases opened and not yet closed."""
        return len(self._open)

    def open_lease(
        self, deadline_s: float, num_readers: int = 1, *, ready: bool = True
    ) -> LeaseRef:
        """Open a lease that ends when `num_readers` ranks are done or it is released.

        `deadline_s` is a time on the monotonic clock. With `ready=False` readers wait until each
        rank's `mark_ready`.

        Raises:
            LeaseTableFull: every slot holds an open lease.
            ValueError: `num_readers` is not in 1..MAX_READERS.
        """
        if not 1 <= num_readers <= MAX_READERS:
            raise ValueError(f"num_readers must be in 1..{MAX_READERS}, got {num_readers}")
        if not self._free:
            raise LeaseTableFull(f"all {self._rows.num_slots} lease slots are open")
        slot = self._free.popleft()
        self._last_generation += 1
        ref = LeaseRef(slot=slot, generation=self._last_generation)
        words, row = self._rows.words, slot * _ROW_WORDS
        words[row + _DEADLINE_NS] = int(deadline_s * 1e9)
        if ready:
            for rank in range(num_readers):
                words[row + _READY + rank] = ref.generation
        words[row + _GENERATION] = ref.generation
        self._open[slot] = _Open(ref, num_readers)
        return ref

    def poll(self) -> tuple[list[LeaseRef], list[LeaseRef]]:
        """Return (leases that ended, leases whose deadline passed) since the last call.

        A lease is reported ended once, and overdue once per deadline; both stay open until
        `close_lease`.
        """
        ended, overdue = [], []
        now_ns = self._clock_ns() if self._open else 0
        for lease in self._open.values():
            if lease.ended:
                continue
            if self._has_ended(lease):
                lease.ended = True
                ended.append(lease.ref)
                continue
            deadline_ns = self._rows.words[lease.ref.slot * _ROW_WORDS + _DEADLINE_NS]
            if deadline_ns < now_ns and deadline_ns != lease.reported_deadline_ns:
                lease.reported_deadline_ns = deadline_ns
                overdue.append(lease.ref)
        return ended, overdue

    def extend(self, ref: LeaseRef, deadline_s: float) -> None:
        """Move the deadline of an open lease to `deadline_s` on the monotonic clock.

        Raises:
            LeaseNotOpen: the lease is not open.
        """
        self._opened(ref)
        self._rows.words[ref.slot * _ROW_WORDS + _DEADLINE_NS] = int(deadline_s * 1e9)

    def release(self, ref: LeaseRef) -> None:
        """Mark an open lease done on the owner's side; the next `poll` reports it ended.

        Only for a lease that no reader will use, or whose reader is known to have stopped.

        Raises:
            LeaseNotOpen: the lease is not open.
        """
        self._opened(ref)
        self._rows.words[ref.slot * _ROW_WORDS + _RELEASED] = ref.generation

    def mark_ready(self, ref: LeaseRef, rank: int = 0) -> None:
        """Publish that the rank's bytes are staged; no effect on a lease that is over."""
        if self._rows.holds(ref):
            self._rows.words[ref.slot * _ROW_WORDS + _READY + _checked(rank)] = ref.generation

    def close_lease(self, ref: LeaseRef) -> None:
        """Invalidate the lease; call it before its blocks are freed.

        Raises:
            LeaseNotOpen: the lease is not open: a lease is closed exactly once.
        """
        self._opened(ref)
        self._rows.words[ref.slot * _ROW_WORDS + _GENERATION] = _FREE
        del self._open[ref.slot]
        self._free.append(ref.slot)

    def close(self) -> None:
        """Drop the table; peers that mapped it keep their mapping."""
        self._rows.close()
        os.close(self._fd)

    def _has_ended(self, lease: _Open) -> bool:
        words, row, generation = (
            self._rows.words,
            lease.ref.slot * _ROW_WORDS,
            lease.ref.generation,
        )
        if words[row + _RELEASED] == generation:
            return True
        return all(words[row + _DONE + rank] == generation for rank in range(lease.num_readers))

    def _opened(self, ref: LeaseRef) -> _Open:
        lease = self._open.get(ref.slot)
        if lease is None or lease.ref != ref:
            raise LeaseNotOpen(f"lease {ref.slot}/{ref.generation} is not open")
        return lease


def _checked(rank: int) -> int:
    if not 0 <= rank < MAX_READERS:
        raise ValueError(f"rank must be in 0..{MAX_READERS - 1}, got {rank}")
    return rank
