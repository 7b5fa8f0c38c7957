"""Geometries, buffers and an exporting process for the tests of `tinfer.worker.kv`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from tinfer.worker.kv.geometry import Geometry, Region
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.puller import PeerInfo, Puller, PullResult
from tinfer.worker.kv.shm import ShmDescriptor
from tinfer.worker.kv.transport import ShmExport

T = TypeVar("T")


def geometry(
    num_blocks: int = 16,
    num_layers: int = 3,
    page_bytes: int = 1024,
    *,
    block_outermost: bool = False,
    offset_bytes: int = 0,
    tail_bytes: int = 0,
    model_hash: str = "m",
) -> Geometry:
    """One region in either layout, with room before and after it."""
    if block_outermost:
        layer_stride, block_stride = page_bytes, page_bytes * num_layers
    else:
        layer_stride, block_stride = page_bytes * num_blocks, page_bytes
    region = Region(offset_bytes, num_layers, layer_stride, block_stride, page_bytes, 0)
    return Geometry(
        layout="blocks" if block_outermost else "layers",
        dtype="bf16",
        block_tokens=16,
        num_blocks=num_blocks,
        total_bytes=offset_bytes + num_layers * num_blocks * page_bytes + tail_bytes,
        model_hash=model_hash,
        tp_size=1,
        tp_rank=0,
        regions=(region,),
    )


def random_bytes(num_bytes: int, seed: int) -> npt.NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-128, 128, num_bytes, dtype=np.int8)


def naive_copy(
    src: Geometry,
    dst: Geometry,
    src_blocks: Sequence[Sequence[int]],
    dst_blocks: Sequence[Sequence[int]],
    source: npt.NDArray[np.int8],
    target: npt.NDArray[np.int8],
) -> npt.NDArray[np.int8]:
    """Copy page by page, straight from the formula: the reference for every plan."""
    result = target.copy()
    for theirs, ours in zip(src.regions, dst.regions, strict=True):
        for a, b in zip(src_blocks[ours.group], dst_blocks[ours.group], strict=True):
            for layer in range(ours.num_layers):
                i = (
                    theirs.offset_bytes
                    + layer * theirs.layer_stride_bytes
                    + a * theirs.block_stride_bytes
                )
                j = (
                    ours.offset_bytes
                    + layer * ours.layer_stride_bytes
                    + b * ours.block_stride_bytes
                )
                result[j : j + ours.page_bytes] = source[i : i + ours.page_bytes]
    return result


def shm_mappings() -> int:
    """How many shared KV mappings this process has."""
    with open("/proc/self/maps") as maps:
        return sum("/memfd:tinfer-" in line for line in maps)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Results:
    """Collects a puller's results; `wake` is handed to the puller."""

    def __init__(self) -> None:
        self._num_ready = threading.Semaphore(0)

    def wake(self) -> None:
        self._num_ready.release()

    def next(self, puller: Puller) -> PullResult:
        """Wait for one result, which must be the only one."""
        assert self._num_ready.acquire(timeout=20), "the puller gave no result"
        (result,) = puller.poll()
        return result


class ExporterProcess:
    """A prefill worker's side in its own process: shared KV memory filled from a seed, leases."""

    def __init__(self, layout: Geometry, seed: int) -> None:
        self.layout = layout
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.kv_exporter", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self.memory = self.ask(layout, ShmDescriptor)
        self.leases = self.ask("leases", ShmDescriptor)

    def ask(self, order: object, answer: type[T]) -> T:
        """Send one order, return its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(msgspec.json.encode(order) + b"\n")
        stdin.flush()
        return msgspec.json.decode(stdout.readline(), type=answer)

    def open_lease(self, num_readers: int = 1) -> LeaseRef:
        return self.ask(f"open {num_readers}", LeaseRef)

    def ended(self) -> list[LeaseRef]:
        return self.ask("ended", list[LeaseRef])

    def reuse_blocks(self) -> None:
        """Close every lease and overwrite all KV memory, as an owner does that took them back."""
        self.ask("reuse", bool)

    def peer(self, worker_id: str = "p", generation: int = 1) -> PeerInfo:
        return PeerInfo(worker_id, generation, ShmExport(self.memory), self.layout, self.leases)

    def reset(self) -> None:
        """Close every lease and fill the memory from the seed again."""
        self.ask("reset", bool)

    def kill(self) -> None:
        self._process.kill()
        self.close()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(20)
