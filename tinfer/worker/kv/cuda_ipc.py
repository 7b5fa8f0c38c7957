"""The CUDA IPC transport: a GPU copies blocks straight out of a peer's GPU memory.

What memory reads after its owner died is not defined, so a copy from a peer that is no longer
alive is never trusted, however it went.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from tinfer.worker.kv.cuda_driver import HANDLE_BYTES, CudaDriver, IpcDriver
from tinfer.worker.kv.device_copy import DeviceCopier, Strategy
from tinfer.worker.kv.errors import PeerGone, TransportUnavailable
from tinfer.worker.kv.geometry import CopyPlan, Geometry
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.shm import process_alive, process_start_ticks
from tinfer.worker.kv.source import StageOrder
from tinfer.worker.kv.transport import (
    BatchCopy,
    CudaIpcExport,
    Export,
    PeerMemory,
    TransportName,
)


class CudaIpcPeer:
    """A peer's KV buffer as an int8 tensor of the reader's device, over memory it does not own."""

    def __init__(
        self, geometry: Geometry, export: CudaIpcExport, address: int, device: torch.device
    ) -> None:
        self.geometry = geometry
        self.address = address
        self._export = export
        # The mapping is addressed from the reader's own device, whichever GPU holds the memory, so
        # the reader's kernels may take it as their own. Source: torch's CUDA graph trees rebuild
        # tensors over bare addresses with this call.
        storage = torch._C._construct_storage_from_data_pointer(
            address + export.storage_offset_bytes, device, export.storage_size_bytes
        )
        self.tensor = torch.empty(0, dtype=torch.int8, device=device).set_(storage)

    def is_trusted(self) -> bool:
        """Tell whether the owner still lives, and with it its memory."""
        return process_alive(self._export.pid, self._export.start_time_ticks)


class CudaIpcTransport:
    """Moves blocks between GPU workers of one machine."""

    name: TransportName = "cuda-ipc"

    def __init__(
        self,
        device: torch.device,
        batch_copy: BatchCopy | None = None,
        driver: IpcDriver | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self._device = device
        self._driver = driver or CudaDriver()
        self._copier = DeviceCopier(device, batch_copy, strategy)
        self._exported: torch.Tensor | None = None

    def allocation_context(self) -> AbstractContextManager[Any] | None:
        """Return None: torch's own allocator makes exportable memory."""
        return None

    def export(self, tensor: torch.Tensor, geometry: Geometry) -> Export:
        """Return the driver's handle; the tensor is kept until `close`."""
        if tensor.numel() < geometry.total_bytes:
            raise TransportUnavailable(
                f"geometry spans {geometry.total_bytes} of {tensor.numel()} bytes"
            )
        handle, offset = self._driver.export_handle(self._device, tensor.data_ptr())
        ticks = process_start_ticks(os.getpid())
        assert ticks is not None, "the calling process runs"
        self._exported = tensor
        return CudaIpcExport(
            device_uuid=self._driver.device_uuid(self._device),
            handle=handle,
            storage_size_bytes=tensor.numel(),
            storage_offset_bytes=offset,
            pid=os.getpid(),
            start_time_ticks=ticks,
        )

    def stage(self, order: StageOrder) -> None:
        """Refuse: readers copy from the buffer itself, `DirectSource` orders nothing."""
        raise ValueError("the cuda-ipc transport stages nothing")

    def staged(self) -> list[LeaseRef]:
        """Return nothing: leases are ready when they open."""
        return []

    def map(self, export: Export, geometry: Geometry) -> PeerMemory:
        """Open the peer's handle in this device's context."""
        if not isinstance(export, CudaIpcExport) or len(export.handle) != HANDLE_BYTES:
            raise TransportUnavailable("the peer does not export a CUDA IPC handle")
        if geometry.total_bytes > export.storage_size_bytes:
            raise TransportUnavailable(
                f"the peer's geometry spans {geometry.total_bytes} of "
                f"{export.storage_size_bytes} bytes"
            )
        reason = self._driver.why_unreachable(self._device, export.device_uuid)
        if reason is not None:
            raise TransportUnavailable(reason)
        if not process_alive(export.pid, export.start_time_ticks):
            raise PeerGone(f"process {export.pid} has ended")
        address = self._driver.open_handle(self._device, export.handle)
        return CudaIpcPeer(geometry, export, address, self._device)

    def fence(self) -> torch.cuda.Event | None:
        """Return an event after the work the engine has queued so far."""
        return self._copier.fence()

    def copy(
        self,
        peer: PeerMemory,
        plan: CopyPlan,
        dst: torch.Tensor,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Copy on a side stream and wait for it."""
        assert isinstance(peer, CudaIpcPeer), "a transport copies from what it mapped"
        self._copier.copy(peer.tensor, dst, plan, after)

    def unmap(self, peer: PeerMemory) -> None:
        """Close the peer's handle."""
        assert isinstance(peer, CudaIpcPeer), "a transport unmaps what it mapped"
        self._driver.close_handle(self._device, peer.address)

    def close(self) -> None:
        """Let go of the exported buffer."""
        self._exported = None
