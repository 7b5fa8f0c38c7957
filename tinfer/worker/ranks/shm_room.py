"""How much of /dev/shm the ranks of one worker take, and whether it is there."""

from __future__ import annotations

import shutil
from pathlib import Path

SHM = Path("/dev/shm")
# A prompt of 32K token ids is 160 KiB in a step's message.
CHUNK_BYTES = 256 << 10
# Source: vLLM 0.32, MessageQueue's default and what the tensor-parallel group asks for.
_CHUNKS = 10
_CHUNKS_AMONG_RANKS = 6
# Per rank, the first per thread as well. Source: measured, vLLM 0.32, ranks with 1 and 2 threads.
_CPU_BUFFER_BYTES = 4 << 20
_CPU_HEADER_BYTES = 256 << 10


def shm_obstacle(num_ranks: int, num_threads: int, device: str) -> str | None:
    """Why /dev/shm cannot hold what a worker's ranks share, or None; leaves nothing there."""
    needed = shm_bytes(num_ranks, num_threads, device)
    free = shutil.disk_usage(SHM).free
    if free >= needed:
        return None
    return (
        f"a worker's {num_ranks} ranks share {needed >> 20} MiB in /dev/shm, and {free >> 20} MiB "
        "are free: enlarge it (docker run --shm-size=1g) or lower --tensor-parallel-size"
    )


def shm_bytes(num_ranks: int, num_threads: int, device: str) -> int:
    """What a worker with so many ranks takes from /dev/shm: a queue to all ranks, one from each,
    one among them, and on a CPU the buffers through which they add up their parts. What NCCL takes
    on GPUs depends on how they are connected, and comes on top."""
    chunks = _CHUNKS * (1 + num_ranks) + _CHUNKS_AMONG_RANKS
    buffers = num_ranks * (num_threads * _CPU_BUFFER_BYTES + _CPU_HEADER_BYTES)
    return chunks * (CHUNK_BYTES + 4096) + (buffers if device == "cpu" else 0)
