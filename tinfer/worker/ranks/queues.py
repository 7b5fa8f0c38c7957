"""The shared-memory queues between a worker and its ranks, at a size that fits any /dev/shm.

vLLM gives each queue ten chunks of 16 or 24 MiB and reserves nothing: 64 MiB of shared memory, a
container's default, are refused, and a full one is a bus error in mid-step. Messages of a step are
some ten KiB; a larger one than a chunk goes through a socket. So chunks are small here, and
reserved.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

from tinfer.worker.ranks.shm_room import CHUNK_BYTES

_NAP_S = 100e-6
_RECHECK_MS = 500  # vLLM: 5000


class SharedMemoryFull(Exception):
    """/dev/shm cannot hold what the ranks of a worker share."""


def shrink_queues() -> None:
    """Make every queue built from now on in this process small and reserved; idempotent."""
    original: Any = ShmRingBuffer.__init__
    if getattr(original, "_tinfer_small", False):
        return

    @functools.wraps(original)
    def small(
        self: Any, n_reader: int, max_chunk_bytes: int, max_chunks: int, name: str | None = None
    ) -> None:
        if name is not None:  # a reader: the writer has decided
            original(self, n_reader, max_chunk_bytes, max_chunks, name)
            return
        original(self, n_reader, min(max_chunk_bytes, CHUNK_BYTES), max_chunks)
        _reserve(self.shared_memory._fd, self.total_bytes_of_buffer)

    small._tinfer_small = True  # type: ignore[attr-defined]
    ring: Any = ShmRingBuffer
    ring.__init__ = small


def nap_in_queues() -> None:
    """Have readers sleep a moment between looks, for as long as vLLM's would spin; idempotent.

    That is a second after each message. Where ranks compute on CPU cores, what spins there takes
    them from what computes. Later they sleep until a socket wakes them, or for as long as it takes
    where that message is lost (seen in November 2026 with readers that never spun).
    """
    module: Any = shm_broadcast
    module.sched_yield = _nap
    module.SHM_READER_RECHECK_INTERVAL_MS = _RECHECK_MS


def _nap() -> None:
    time.sleep(_NAP_S)


def _reserve(fd: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SharedMemoryFull(f"/dev/shm has no {num_bytes >> 10} KiB left for a queue") from error
