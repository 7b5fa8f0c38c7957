"""The NVIDIA GPUs that this server may use, by NVML: no CUDA context, nothing initialised.

A GPU's index here is NVML's (PCI bus order, the one that nvidia-smi shows). Workers are told UUIDs,
so CUDA's own order (CUDA_DEVICE_ORDER) changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pynvml
from msgspec import Struct

from tinfer.errors import StartError

VARIABLE = "CUDA_VISIBLE_DEVICES"


class Gpu(Struct, frozen=True):
    """What CUDA can be given as one device: a GPU, or a slice of a GPU in MIG mode.

    `index` is that of the GPU itself, so slices share it; `capability` is the compute capability.
    """

    index: int
    uuid: str
    model: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    is_slice: bool = False

    @property
    def name(self) -> str:
        """How a user names it: nvidia-smi's index, or the UUID of a slice."""
        return self.uuid if self.is_slice else str(self.index)


def usable_gpus(nvml: Any = pynvml, environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none where there is no driver.

    Raises `StartError` for a name that fits no GPU or several, and for a driver that is there and
    does not answer.
    """
    allowed = environ.get(VARIABLE)
    if allowed is not None and not _names(allowed):
        return []
    gpus = _read(nvml)
    if not gpus or allowed is None:
        return gpus
    return select(_names(allowed), gpus, VARIABLE)


def select(names: Sequence[str], gpus: Sequence[Gpu], where: str) -> list[Gpu]:
    """The GPUs of these names (an index, or a UUID, which may be shortened), in that order.

    Raises `StartError`; `where` is what the user wrote them into.
    """
    chosen: list[Gpu] = []
    for name in names:
        found = _find(name, gpus)
        if not found:
            have = ", ".join(gpu.name for gpu in gpus)
            raise StartError(f"{where}: there is no GPU {name}; to be had: {have}")
        if len(found) > 1:
            fits = ", ".join(gpu.uuid for gpu in found)
            raise StartError(f"{where}: {name} is not one GPU but several: {fits}")
        if found[0] in chosen:
            raise StartError(f"{where}: GPU {name} is named twice")
        chosen += found
    return chosen


def _names(value: str) -> list[str]:
    """What CUDA looks at: entries up to the first negative one. "NoDevFiles" is how some container
    tools write none."""
    names = []
    for entry in value.split(","):
        name = entry.strip()
        if name.startswith("-") or name == "NoDevFiles":
            break
        if name:
            names.append(name)
    return names


def _find(name: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    if name.isdecimal():
        return [gpu for gpu in gpus if gpu.index == int(name)]
    if not name.startswith(("GPU-", "MIG-")):
        return []
    exact = [gpu for gpu in gpus if gpu.uuid == name]
    return exact or [gpu for gpu in gpus if gpu.uuid.startswith(name)]


def _read(nvml: Any) -> list[Gpu]:
    absent = (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded)
    try:
        nvml.nvmlInit()
    except absent:
        return []
    except nvml.NVMLError as error:
        raise _broken(error) from error
    try:
        return [
            gpu
            for index in range(nvml.nvmlDeviceGetCount())
            for gpu in _devices_of(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index))
        ]
    except nvml.NVMLError as error:
        raise _broken(error) from error
    finally:
        nvml.nvmlShutdown()


def _broken(error: Exception) -> StartError:
    return StartError(f"the NVIDIA driver does not answer: {error} (without GPUs: {VARIABLE}=-1)")


def _devices_of(nvml: Any, index: int, handle: Any) -> Iterator[Gpu]:
    """The GPU itself, or its slices where MIG is on: then CUDA does not take it as a whole."""
    model = str(nvml.nvmlDeviceGetName(handle))
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    is_mig = _is_mig(nvml, handle)
    for device in _slices(nvml, handle) if is_mig else [handle]:
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        yield Gpu(
            index=index,
            uuid=str(nvml.nvmlDeviceGetUUID(device)),
            model=model,
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
            capability=(int(major), int(minor)),
            is_slice=is_mig,
        )


def _is_mig(nvml: Any, handle: Any) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # a GPU that knows no MIG
        return False
    return bool(current)


def _slices(nvml: Any, handle: Any) -> Iterator[Any]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError:  # a place for a slice that does not exist
            continue
