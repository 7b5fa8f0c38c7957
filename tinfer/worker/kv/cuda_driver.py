"""The few CUDA driver calls that torch does not offer as plain data: memory handles for peers.

torch's own sharing keeps a counter file per export in /dev/shm, which a killed worker leaves
behind, and opens a peer's memory in a context on the peer's GPU. The driver does neither: a handle
is 64 bytes, and opens in the context of the reader's own GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

from tinfer.worker.kv.errors import TransportUnavailable

HANDLE_BYTES = 64  # Source: CU_IPC_HANDLE_SIZE, cuda.h
_LAZY_ENABLE_PEER_ACCESS = 1  # Source: CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, cuda.h


class IpcDriver(Protocol):
    """What `CudaIpcTransport` needs of a driver."""

    def device_uuid(self, device: torch.device) -> str:
        """Return the device's UUID, the same in every process."""

    def why_unreachable(self, device: torch.device, peer_uuid: str) -> str | None:
        """Return why `device` cannot read the memory of the device `peer_uuid`, None if it can."""

    def export_handle(self, device: torch.device, address: int) -> tuple[bytes, int]:
        """Return (handle of the allocation around `address`, offset of `address` in it)."""

    def open_handle(self, device: torch.device, handle: bytes) -> int:
        """Map a peer's allocation; return its address here."""

    def close_handle(self, device: torch.device, address: int) -> None:
        """Unmap what `open_handle` returned."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaDriver:
    """libcuda through ctypes, in torch's contexts.

    Raises:
        TransportUnavailable: there is no driver, or a call failed; the message names both.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransportUnavailable(f"no CUDA driver: {error}") from error
        pointer = ctypes.c_uint64
        for name, types in {
            "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), pointer),
            "cuIpcOpenMemHandle_v2": (ctypes.POINTER(pointer), _Handle, ctypes.c_uint),
            "cuIpcCloseMemHandle": (pointer,),
            "cuMemGetAddressRange_v2": (
                ctypes.POINTER(pointer),
                ctypes.POINTER(ctypes.c_size_t),
                pointer,
            ),
            "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
        }.items():
            getattr(self._cuda, name).argtypes = types

    def device_uuid(self, device: torch.device) -> str:
        """Return the device's UUID."""
        return str(torch.cuda.get_device_properties(device).uuid)

    def why_unreachable(self, device: torch.device, peer_uuid: str) -> str | None:
        """Check that the peer's device is visible here and can be accessed from `device`."""
        own = _ordinal(device)
        for ordinal in range(torch.cuda.device_count()):
            if self.device_uuid(torch.device("cuda", ordinal)) != peer_uuid:
                continue
            if ordinal != own and not torch.cuda.can_device_access_peer(own, ordinal):
                return f"GPU {own} has no peer access to GPU {ordinal}"
            return None
        return f"GPU {peer_uuid} is not visible in this process"

    def export_handle(self, device: torch.device, address: int) -> tuple[bytes, int]:
        """Return the handle of the allocation that holds `address`, and the offset in it."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self._call(
            device, "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address
        )
        self._call(device, "cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle), address - base.value

    def open_handle(self, device: torch.device, handle: bytes) -> int:
        """Map a peer's allocation into the context of `device`."""
        address = ctypes.c_uint64()
        self._call(
            device,
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            _LAZY_ENABLE_PEER_ACCESS,
        )
        return address.value

    def close_handle(self, device: torch.device, address: int) -> None:
        """Unmap a peer's allocation."""
        self._call(device, "cuIpcCloseMemHandle", address)

    def _call(self, device: torch.device, name: str, *args: Any) -> None:
        with torch.cuda.device(device):
            # A thread that has not used CUDA has no current context; this gives it torch's.
            torch.cuda.synchronize(device)
            status = getattr(self._cuda, name)(*args)
        if status != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(text))
            reason = text.value.decode() if text.value else str(status)
            raise TransportUnavailable(f"{name} failed on {device}: {reason}")


def _ordinal(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
