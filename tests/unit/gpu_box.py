"""GPUs that no machine needs to have: NVML as far as tinfer asks it, and the GPUs it would tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tinfer.master.gpus import Gpu

GIB = 1 << 30


class NVMLError(Exception):
    """Base of the fake's errors, as pynvml has it."""


class NVMLErrorLibraryNotFound(NVMLError):
    """There is no NVML."""


class NVMLErrorDriverNotLoaded(NVMLError):
    """There is no driver."""


class FakeNvml:
    """Stands in for the module pynvml; a GPU is a dict, and a slice of one is another."""

    NVMLError = NVMLError
    NVMLError_LibraryNotFound = NVMLErrorLibraryNotFound
    NVMLError_DriverNotLoaded = NVMLErrorDriverNotLoaded

    def __init__(self, *devices: dict[str, Any], init_error: Exception | None = None) -> None:
        self.devices = devices
        self.init_error = init_error
        self.num_open = 0

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.devices[index]

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:
        return str(handle.get("name", "Card"))

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:
        if "broken" in handle:
            raise NVMLError(handle["broken"])
        total = handle.get("total", 80 * GIB)
        return SimpleNamespace(total=total, free=handle.get("free", total))

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> tuple[int, int]:
        capability: tuple[int, int] = handle.get("capability", (9, 0))
        return capability

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> tuple[int, int]:
        if "slices" not in handle:
            raise NVMLError("Not Supported")
        return (handle.get("mig", 1), 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(
        self, handle: dict[str, Any], number: int
    ) -> dict[str, Any]:
        if number >= len(handle["slices"]):
            raise NVMLError("Not Found")
        part: dict[str, Any] = handle["slices"][number]
        return part


def gpu(
    index: int,
    total_gib: float = 80,
    capability: tuple[int, int] = (9, 0),
    is_slice: bool = False,
) -> Gpu:
    total = int(total_gib * GIB)
    kind = "MIG" if is_slice else "GPU"
    return Gpu(index, f"{kind}-{index:04x}", "Card", total, total, capability, is_slice)


def gpus(count: int, **more: Any) -> list[Gpu]:
    return [gpu(index, **more) for index in range(count)]
