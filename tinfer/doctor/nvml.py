"""What `tinfer serve` does not ask NVML: the driver's version, and who has memory on which GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from tinfer.errors import StartError
from tinfer.master.gpus import Gpu, usable_gpus


class Holder(Struct, frozen=True):
    """A process with memory on a GPU; `used_bytes` is None where NVML may not say."""

    pid: int
    used_bytes: int | None = None


class Inventory(Struct, frozen=True):
    """What NVML told.

    `gpus` are those that a server with this environment would use, `num_listed` counts GPUs with
    the others; `holders` by the UUIDs of `gpus`. `error` is why something could not be asked, or
    what is wrong with CUDA_VISIBLE_DEVICES; `is_missing` says that there is no driver to ask.
    """

    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    num_listed: int = 0
    holders: dict[str, tuple[Holder, ...]] = {}
    error: str = ""
    is_missing: bool = False


def read_inventory(nvml: Any, environ: Mapping[str, str]) -> Inventory:
    """Ask NVML; `nvml` is the module pynvml or one like it. Raises nothing of NVML's own."""
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return Inventory(is_missing=True)
    except nvml.NVMLError as error:
        return Inventory(error=str(error))
    driver, num_listed = "", 0
    try:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        num_listed = nvml.nvmlDeviceGetCount()
        gpus = tuple(usable_gpus(nvml, environ))
        holders = {gpu.uuid: tuple(_holders(nvml, gpu.uuid)) for gpu in gpus}
        return Inventory(driver, gpus, num_listed, holders)
    except nvml.NVMLError as error:
        return Inventory(driver, (), num_listed, error=str(error))
    except StartError as error:
        return Inventory(driver, (), num_listed, error=error.message)
    finally:
        nvml.nvmlShutdown()


def _holders(nvml: Any, uuid: str) -> Iterator[Holder]:
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:  # not told to this user, or not of a slice
        return
    for process in running:
        yield Holder(int(process.pid), process.usedGpuMemory)
