"""The host transport: GPU workers without peer access exchange blocks through pinned memory.

Pulls are driven by the reader, which cannot see the owner's GPU. So the owner copies the blocks of
a lease to slots of a bounded pool in shared memory when the lease opens, and marks it ready when
they are there; readers wait for that and copy from the slots.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch

from tinfer.worker.kv.device_copy import DeviceCopier, is_done
from tinfer.worker.kv.errors import KVMemoryError, TransportUnavailable
from tinfer.worker.kv.geometry import CopyPlan, Geometry, copy_plan
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.memory import MappedShm, ShmBuffer, attach, tensor_over
from tinfer.worker.kv.source import DEFAULT_STAGING_SLOTS, StageOrder, staging_geometry
from tinfer.worker.kv.transport import Export, HostExport, PeerMemory, TransportName


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class PinnedHost:
    """Shared host memory, int8 of shape [bytes], registered with CUDA where there is a GPU."""

    def __init__(self, tensor: torch.Tensor, pin: bool) -> None:
        self.tensor = tensor
        self._pinned = pin
        if pin:
            status = _cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
            if int(status) != 0:
                raise KVMemoryError(f"cannot pin {tensor.numel()} bytes: CUDA error {int(status)}")

    def close(self) -> None:
        """Unregister; the memory itself belongs to the tensor."""
        if self._pinned:
            _cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False


class HostPeer:
    """A peer's staging pool, mapped here."""

    def __init__(self, memory: MappedShm, pool: PinnedHost, geometry: Geometry) -> None:
        self.memory = memory
        self.pool = pool
        self.geometry = geometry

    def is_trusted(self) -> bool:
        """Return True: what was staged stays, whatever happens to the peer."""
        return True


class HostTransport:
    """Moves blocks between GPU workers by way of host memory."""

    name: TransportName = "host"

    def __init__(self, device: torch.device, num_slots: int = DEFAULT_STAGING_SLOTS) -> None:
        self._pin = device.type == "cuda"
        # A stream each: what is staged for others must not queue behind this worker's own pulls.
        self._owner = DeviceCopier(device)
        self._reader = DeviceCopier(device)
        self._num_slots = num_slots
        self._kv: torch.Tensor | None = None
        self._geometry: Geometry | None = None
        self._buffer: ShmBuffer | None = None
        self._pool: PinnedHost | None = None
        self._staging: deque[tuple[LeaseRef, torch.cuda.Event | None]] = deque()

    def allocation_context(self) -> AbstractContextManager[Any] | None:
        """Return None: the KV buffer itself is not shared."""
        return None

    def export(self, tensor: torch.Tensor, geometry: Geometry) -> Export:
        """Make the staging pool."""
        self._kv, self._geometry = tensor, geometry
        size_bytes = staging_geometry(geometry, self._num_slots).total_bytes
        self._buffer = ShmBuffer(size_bytes, "staging")
        self._pool = PinnedHost(self._buffer.as_tensor(), self._pin)
        return HostExport(memory=self._buffer.descriptor(), num_slots=self._num_slots)

    def stage(self, order: StageOrder) -> None:
        """Queue the copy of the order's blocks to their slots."""
        assert self._kv is not None and self._geometry is not None and self._pool is not None
        pool_geometry = staging_geometry(self._geometry, self._num_slots)
        plan = copy_plan(self._geometry, pool_geometry, order.blocks, order.slots)
        event = self._owner.start_copy_out(self._kv, self._pool.tensor, plan)
        self._staging.append((order.lease, event))

    def staged(self) -> list[LeaseRef]:
        """Return the leases whose copies have completed; they complete in order."""
        done = []
        while self._staging and is_done(self._staging[0][1]):
            done.append(self._staging.popleft()[0])
        return done

    def map(self, export: Export, geometry: Geometry) -> PeerMemory:
        """Map and pin the peer's pool."""
        if not isinstance(export, HostExport):
            raise TransportUnavailable(f"the peer exports {type(export).__name__}, not host")
        pool_geometry = staging_geometry(geometry, export.num_slots)
        if pool_geometry.total_bytes > export.memory.size_bytes:
            raise TransportUnavailable(
                f"{export.num_slots} slots do not fit {export.memory.size_bytes} bytes"
            )
        # CUDA registers only memory that is mapped for writing.
        memory = attach(export.memory, writable=True)
        pool = PinnedHost(tensor_over(memory.mapping), self._pin)
        return HostPeer(memory, pool, pool_geometry)

    def fence(self) -> torch.cuda.Event | None:
        """Return an event after the work the engine has queued so far."""
        return self._reader.fence()

    def copy(
        self,
        peer: PeerMemory,
        plan: CopyPlan,
        dst: torch.Tensor,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Copy from the peer's slots to the device and wait for it."""
        assert isinstance(peer, HostPeer), "a transport copies from what it mapped"
        self._reader.copy_in(peer.pool.tensor, dst, plan, after)

    def unmap(self, peer: PeerMemory) -> None:
        """Unpin and unmap the peer's pool."""
        assert isinstance(peer, HostPeer), "a transport unmaps what it mapped"
        peer.pool.close()
        del peer.pool
        peer.memory.close()

    def close(self) -> None:
        """Give up the staging pool."""
        for _, event in self._staging:
            if event is not None:
                event.synchronize()
        self._staging.clear()
        if self._pool is not None and self._buffer is not None:
            self._pool.close()
            self._pool = None
            self._buffer.close()
            self._buffer = None
        self._kv = None
