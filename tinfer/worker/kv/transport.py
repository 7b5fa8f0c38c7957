"""How one worker's KV memory becomes readable in another process, behind one interface.

The connector and the puller know only `Transport`; which of the three it is was decided once, at
start (`probe.choose_transport`). An `Export` is plain data and travels through the master.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import msgspec
import torch

from tinfer.worker.kv.geometry import CopyPlan, Geometry
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.shm import ShmDescriptor
from tinfer.worker.kv.source import StageOrder

TransportName = Literal["shm", "cuda-ipc", "host"]

BatchCopy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""`(src_addresses, dst_addresses, sizes)`, int64 CPU tensors, queued on the current stream."""


class ShmExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shm"):
    """A KV buffer in shared memory."""

    memory: ShmDescriptor


class CudaIpcExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cuda-ipc"):
    """A KV buffer on a GPU: the driver's handle to the allocation, and where the buffer lies in it.

    The device is named by UUID, since its ordinal differs between processes.
    """

    device_uuid: str
    handle: bytes
    storage_size_bytes: int
    storage_offset_bytes: int
    pid: int
    start_time_ticks: int


class HostExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="host"):
    """A pool of `num_slots` staging slots in shared host memory."""

    memory: ShmDescriptor
    num_slots: int


Export = ShmExport | CudaIpcExport | HostExport


class PeerMemory(Protocol):
    """A peer's exported memory, mapped here."""

    @property
    def geometry(self) -> Geometry:
        """Return the geometry in which the peer's `SourceBlocks` are numbered."""

    def is_trusted(self) -> bool:
        """Tell whether bytes read up to now are what the peer wrote.

        Shared memory outlives its owner; memory of a GPU whose owner died may not.
        """


class Transport(Protocol):
    """One way to move KV blocks; one instance per worker process and device.

    The owner side (`allocation_context`, `export`, `stage`, `staged`, `fence`) is called from the
    engine's thread, the reader side (`map`, `copy`, `unmap`) from the puller's.
    """

    name: TransportName

    def allocation_context(self) -> AbstractContextManager[Any] | None:
        """Return the context in which the engine must allocate its KV buffer, if it matters."""

    def export(self, tensor: torch.Tensor, geometry: Geometry) -> Export:
        """Make the KV buffer, int8 of shape [geometry.total_bytes] or more, readable by peers.

        The transport keeps `tensor`'s storage alive until `close`.

        Raises:
            TransportUnavailable: this memory cannot be exported; the message says why.
        """

    def stage(self, order: StageOrder) -> None:
        """Start to copy blocks to where readers find them; does not wait."""

    def staged(self) -> list[LeaseRef]:
        """Return the leases whose `stage` has completed since the last call."""

    def map(self, export: Export, geometry: Geometry) -> PeerMemory:
        """Map a peer's export; `geometry` is that of the peer's KV buffer.

        Raises:
            PeerGone: the peer has ended.
            TransportUnavailable: the memory cannot be mapped here; the message says why.
        """

    def fence(self) -> torch.cuda.Event | None:
        """Mark the work queued so far by the calling thread, for `copy` to wait on."""

    def copy(
        self,
        peer: PeerMemory,
        plan: CopyPlan,
        dst: torch.Tensor,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Carry out `plan` from the peer's memory into `dst`; returns when the bytes are there."""

    def unmap(self, peer: PeerMemory) -> None:
        """Give up a mapping; no copy from it may be running."""

    def close(self) -> None:
        """Give up what was exported."""
