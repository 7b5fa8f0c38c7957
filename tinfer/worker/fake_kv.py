"""The fake engine's KV memory: real shared memory, in which a block is 16 bytes of digest.

The owner's side of a hand-off: blocks are given out, written, and held under real leases. A block
is scrubbed when it is given out, so a reader that comes too late finds other bytes for certain.
"""

from __future__ import annotations

import os
import time

import msgspec
from msgspec import Struct

from tinfer.wire.messages import LeaseId, Source
from tinfer.worker.fake_model import DIGEST_BYTES
from tinfer.worker.kv.errors import LeaseTableFull
from tinfer.worker.kv.lease import DEFAULT_SLOTS, LeaseRef, LeaseTable
from tinfer.worker.kv.shm import ShmDescriptor, close_mmap, create_memfd, describe

_SCRUBBED = bytes(DIGEST_BYTES)


class FakeExport(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a fake worker's `Ready.export`."""

    kv: ShmDescriptor
    leases: ShmDescriptor
    block_tokens: int


class FakeBlocks(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a fake worker's `Source.blocks`."""

    blocks: list[int]


class FakeKV:
    """A pool of blocks in a memfd; every block is free, or has one owner who gives it back."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._fd, self._memory = create_memfd("fake-kv", num_blocks * DIGEST_BYTES)
        # Last in, first out: a block that is read after its lease is soon somebody else's.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def descriptor(self) -> ShmDescriptor:
        return describe(self._fd)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """That many scrubbed blocks, or None if there are not enough."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._is_used[block] = 1
            self.write(block, _SCRUBBED)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back. Raises `ValueError` for one that is free already."""
        for block in reversed(blocks):
            if not self._is_used[block]:
                raise ValueError(f"block {block} is freed twice")
            self._is_used[block] = 0
            self._free.append(block)

    def write(self, block: int, digest: bytes) -> None:
        start = block * DIGEST_BYTES
        self._memory[start : start + DIGEST_BYTES] = digest

    def read(self, block: int) -> bytes:
        start = block * DIGEST_BYTES
        return self._memory[start : start + DIGEST_BYTES]

    def close(self) -> None:
        close_mmap(self._memory)
        os.close(self._fd)


class Holdings:
    """The blocks of finished prefills, each under a lease until its reader has stopped."""

    def __init__(self, kv: FakeKV, worker_id: str, generation: int, ttl_s: float) -> None:
        self._kv = kv
        self._worker_id = worker_id
        self._generation = generation
        self._ttl_s = ttl_s
        # Every lease holds at least one block, so this many slots never run out.
        self._leases = LeaseTable.create(max(DEFAULT_SLOTS, kv.num_blocks))
        self._held: dict[LeaseRef, list[int]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def descriptor(self) -> ShmDescriptor:
        return self._leases.descriptor()

    def hold(self, blocks: list[int], num_tokens: int) -> Source | None:
        """Take over blocks until a reader is done with them; None leaves them with the caller."""
        try:
            ref = self._leases.open_lease(time.monotonic() + self._ttl_s)
        except LeaseTableFull:
            return None
        self._held[ref] = blocks
        return Source(
            worker_id=self._worker_id,
            worker_generation=self._generation,
            lease=_lease_id(ref),
            num_tokens=num_tokens,
            num_blocks=len(blocks),
            blocks=msgspec.msgpack.encode(FakeBlocks(blocks)),
        )

    def poll(self) -> tuple[list[LeaseId], list[LeaseId]]:
        """Free the blocks of leases that have ended; return those leases, and the overdue ones."""
        if not self._held:
            return [], []
        ended, overdue = self._leases.poll()
        for ref in ended:
            self._leases.close_lease(ref)
            self._kv.free(self._held.pop(ref))
        return [_lease_id(ref) for ref in ended], [_lease_id(ref) for ref in overdue]

    def release(self, lease: LeaseId) -> None:
        """End a lease that nobody will read; unknown ones are ignored."""
        ref = LeaseRef(lease.slot, lease.generation)
        if ref in self._held:
            self._leases.release(ref)

    def extend(self, lease: LeaseId, extra_s: float) -> None:
        ref = LeaseRef(lease.slot, lease.generation)
        if ref in self._held:
            self._leases.extend(ref, time.monotonic() + extra_s)

    def close(self) -> None:
        self._leases.close()


def _lease_id(ref: LeaseRef) -> LeaseId:
    return LeaseId(ref.slot, ref.generation)
