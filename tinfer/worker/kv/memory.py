"""KV memory that peers can map: checked against what the machine has, reserved, then populated.

The check comes first because the kernel's own answer to a reservation beyond its memory is not an
error: it looks for a process to kill. Reserved memory is not yet mapped, and the first touch of a
page costs far more than a copy of it (0.6 GB/s, two AMD EPYC cores, November 2026), so a thread
populates the buffer while the engine goes on building.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from tinfer.cgroup import CGROUPS, PROC, memory_limits, read_text
from tinfer.worker.kv.errors import KVMemoryError
from tinfer.worker.kv.shm import ShmDescriptor, attach_mmap, close_mmap, create_memfd, describe

MADV_POPULATE_WRITE = 23  # Source: linux/mman.h, since Linux 5.14; not in Python's mmap module
_SLICE_BYTES = 16 << 20
_RESERVE_BYTES = 64 << 20  # left to the rest of the process when a limit is checked


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> tuple[int, str]:
    """Return how much more memory this process may take, and the limit that says so: MemAvailable,
    or a memory control group that has less left."""
    groups = [(limit.left_bytes, str(limit.file)) for limit in memory_limits(proc, cgroups)]
    return min([(_mem_available(proc), "MemAvailable"), *groups])


def _mem_available(proc: Path) -> int:
    for line in read_text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise KVMemoryError(f"{proc / 'meminfo'} names no MemAvailable")


class ShmBuffer:
    """A reserved memfd that holds a worker's KV cache, as bytes and as a tensor.

    Raises:
        KVMemoryError: the machine or a cgroup has less memory left than asked for.
    """

    def __init__(
        self,
        size_bytes: int,
        name: str = "kv",
        available: Callable[[], tuple[int, str]] = available_bytes,
    ) -> None:
        left_bytes, limit = available()
        if size_bytes + _RESERVE_BYTES > left_bytes:
            raise KVMemoryError(
                f"{size_bytes} bytes of KV memory asked for, {left_bytes} left under {limit}"
            )
        self.size_bytes = size_bytes
        self._fd, self._mapping = create_memfd(name, size_bytes)
        self._stop = threading.Event()
        self._populating: threading.Thread | None = None

    def as_tensor(self) -> torch.Tensor:
        """Return the memory as an int8 CPU tensor of shape [size_bytes]; it keeps the memory."""
        return tensor_over(self._mapping)

    def descriptor(self) -> ShmDescriptor:
        """Return what a peer needs to map the buffer; valid until `close`."""
        return describe(self._fd)

    def populate_in_background(self) -> threading.Thread:
        """Map every page from a daemon thread; contents stay as they are."""
        if self._populating is None:
            self._populating = threading.Thread(
                target=populate,
                args=(self._mapping, self._stop.is_set),
                name="kv-populate",
                daemon=True,
            )
            self._populating.start()
        return self._populating

    def close(self) -> None:
        """Give up the descriptor; the memory goes when the last tensor and peer mapping go."""
        self._stop.set()
        if self._populating is not None:
            self._populating.join()
        os.close(self._fd)
        close_mmap(self._mapping)
        # Where tensors kept it open, the last of them must find no other reference.
        del self._mapping


def tensor_over(mapping: mmap.mmap) -> torch.Tensor:
    """Return a writable mapping as an int8 tensor that keeps it mapped, also past its `close`."""
    # Not torch.frombuffer: that keeps the mmap object alive, but lets go of its buffer, so that
    # closing the mmap would unmap the memory under the tensor. numpy's array holds on to it.
    return torch.from_numpy(np.frombuffer(mapping, np.int8))


def populate(mapping: mmap.mmap, stopped: Callable[[], bool]) -> None:
    """Map every page of a writable shared mapping, without changing its bytes.

    Works in slices of 16 MiB, between which it looks at `stopped`.
    """
    # Python's own mmap.madvise holds the GIL for the whole call; this one does not.
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    pages: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
    for start in range(0, len(pages), _SLICE_BYTES):
        if stopped():
            return
        part = pages[start : start + _SLICE_BYTES]
        if madvise(part.ctypes.data, len(part), MADV_POPULATE_WRITE) != 0:
            # An older kernel. Reading maps the page too, and cannot undo what the engine writes.
            part[:: mmap.PAGESIZE].max()


class MappedShm:
    """Another process's shared memory, mapped here; it stays readable if that process dies."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping = mapping
        self.size_bytes = len(mapping)

    def close(self) -> None:
        """Unmap; memory still viewed by an array or tensor stays until that goes."""
        close_mmap(self.mapping)


def attach(descriptor: ShmDescriptor, *, writable: bool = False) -> MappedShm:
    """Map a peer's shared memory, read-only unless `writable`.

    Raises:
        PeerGone: the peer has ended, or the descriptor no longer names this memory.
    """
    return MappedShm(attach_mmap(descriptor, writable=writable))


class KVAllocation(TorchFunctionMode):
    """The context that `allocation_mode` makes; `allocated` is the tensor it served, or None."""

    def __init__(self, make: Callable[[int], torch.Tensor], min_bytes: int) -> None:
        super().__init__()
        self._make = make
        self._min_bytes = min_bytes
        self.allocated: torch.Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Serve the KV allocation, pass everything else on."""
        kwargs = kwargs or {}
        if func is torch.zeros and self.allocated is None:
            num_bytes = _kv_allocation_bytes(args, kwargs)
            if num_bytes is not None and num_bytes >= self._min_bytes:
                self.allocated = self._make(num_bytes)
                return self.allocated
        return func(*args, **kwargs)


def allocation_mode(make: Callable[[int], torch.Tensor], min_bytes: int = 1 << 20) -> KVAllocation:
    """Return a context that serves the engine's one KV allocation from `make(num_bytes)`.

    The first `torch.zeros` of a 1-D int8 CPU tensor of at least `min_bytes` is served; `make`
    returns a zeroed int8 tensor of shape [num_bytes]. Every other call, and every later one, runs
    unchanged. Source: vLLM 0.32 allocates all layers' KV with one such call.
    """
    return KVAllocation(make, min_bytes)


def _kv_allocation_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return n if the call is `torch.zeros(n, dtype=int8, device=cpu)` in any spelling."""
    size = args[0] if args else kwargs.get("size")
    if len(args) > 1 or not set(kwargs) <= {"size", "dtype", "device"}:
        return None
    if isinstance(size, (tuple, list)):
        size = size[0] if len(size) == 1 else None
    device = kwargs.get("device")
    device = torch.get_default_device() if device is None else torch.device(device)
    if not isinstance(size, int) or kwargs.get("dtype") is not torch.int8 or device.type != "cpu":
        return None
    return size
