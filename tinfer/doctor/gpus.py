"""Checks of GPUs, driver and device files; all take what was read elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tinfer.doctor.finding import Finding, fault, ok, size, warning
from tinfer.doctor.nvml import Holder, Inventory
from tinfer.master.gpus import Gpu

# Source: NVIDIA, CUDA compatibility guide, minor version compatibility: CUDA 13.x needs >= 580.
MIN_DRIVER = 580
# Source: vLLM's GPU installation page: compute capability 7.5 or higher.
MIN_COMPUTE_CAPABILITY = (7, 5)
# A worker takes this share of a GPU's memory unless told otherwise (--gpu-memory-utilization).
DEFAULT_SHARE = 0.9
# Less than this of a GPU is not worth advising.
LEAST_SHARE = 0.1
_NVIDIA_PCI_VENDOR = "0x10de"
_DISPLAY_PCI_CLASS = "0x03"


def check_driver(inventory: Inventory, num_pci_gpus: int) -> Finding:
    """The driver, or why there is none; `num_pci_gpus` NVIDIA GPUs are on the bus."""
    check = "GPU driver"
    container = "in a container: docker run --gpus all"
    if inventory.is_missing:
        if num_pci_gpus == 0:
            return ok(check, "no NVIDIA GPU and no driver: workers run on CPU cores")
        return warning(
            check,
            f"none here, with {num_pci_gpus} NVIDIA GPUs on the bus",
            f"install the NVIDIA driver {MIN_DRIVER} or newer; {container}",
        )
    major = re.match(r"\d+", inventory.driver)
    if major is not None and int(major.group()) < MIN_DRIVER:
        return fault(
            check,
            f"{inventory.driver}, CUDA 13 needs {MIN_DRIVER} or newer",
            "update the driver, or use the CPU build: bin/setup --device cpu",
        )
    if inventory.error:
        words = f"{inventory.driver}: {inventory.error}" if inventory.driver else inventory.error
        return fault(check, words, "see what nvidia-smi says; CUDA_VISIBLE_DEVICES=-1 does without")
    if not inventory.num_listed:
        return warning(check, f"{inventory.driver}, but it lists no GPU", container)
    if not inventory.gpus:
        return warning(
            check,
            f"{inventory.driver}; CUDA_VISIBLE_DEVICES hides all {inventory.num_listed} GPUs",
            "unset it, unless workers are meant to run on CPU cores",
        )
    num_hidden = inventory.num_listed - len({gpu.index for gpu in inventory.gpus})
    hidden = f"; CUDA_VISIBLE_DEVICES hides {num_hidden} of {inventory.num_listed} GPUs"
    return ok(check, inventory.driver + (hidden if num_hidden else ""))


def check_gpu(
    gpu: Gpu, holders: Sequence[Holder], name_of: Callable[[int], str], is_only: bool
) -> Finding:
    """One GPU or MIG slice; `name_of` turns a pid into a name, `is_only` says that no other GPU is
    new enough."""
    check = f"GPU {gpu.name}"
    room = f"{size(gpu.free_bytes)} of {size(gpu.total_bytes)} free"
    words = f"{gpu.model}, {room}, compute capability {'.'.join(map(str, gpu.capability))}"
    if gpu.is_slice:
        words += f", a MIG slice of GPU {gpu.index}"
    if gpu.capability < MIN_COMPUTE_CAPABILITY:
        need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
        if is_only:
            return fault(check, words, f"vLLM needs {need} or higher: bin/setup --device cpu")
        return warning(check, words, f"vLLM needs {need}: leave it out of CUDA_VISIBLE_DEVICES")
    if holders:
        words += f"; held by {', '.join(_holder(holder, name_of) for holder in holders)}"
    if gpu.free_bytes < DEFAULT_SHARE * gpu.total_bytes:
        share = int(100 * gpu.free_bytes / gpu.total_bytes) / 100
        advice = f"a worker takes {DEFAULT_SHARE:.0%} of it: end what holds it"
        if share >= LEAST_SHARE:
            advice += f", or serve with --gpu-memory-utilization {share:.2f}"
        return warning(check, words, advice)
    return ok(check, words)


def check_device_files(files: Mapping[str, bool]) -> list[Finding]:
    """The /dev/nvidia* files, path to whether this user may read and write it."""
    if not files:
        return []
    closed = sorted(path for path, is_open in files.items() if not is_open)
    if closed:
        return [
            fault(
                "GPU files",
                f"no permission for {', '.join(closed)}",
                "add this user to their group (often video or render: usermod -aG), log in again",
            )
        ]
    if not any(path.endswith("/nvidia-uvm") for path in files):
        return [
            warning("GPU files", "/dev/nvidia-uvm is missing", "nvidia-modprobe -u -c 0, as root")
        ]
    return [ok("GPU files", f"{len(files)} files of /dev/nvidia* may be read and written")]


def read_device_files(dev: Path = Path("/dev")) -> dict[str, bool]:
    """Every /dev/nvidia* character file, and whether it may be read and written."""
    paths = (path for path in dev.glob("nvidia*") if not path.is_dir())
    return {str(path): os.access(path, os.R_OK | os.W_OK) for path in sorted(paths)}


def count_pci_gpus(sys_root: Path = Path("/sys")) -> int:
    """NVIDIA display devices on the PCI bus, with or without a driver."""
    count = 0
    for device in (sys_root / "bus/pci/devices").glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:  # unplugged meanwhile
            continue
        count += vendor == _NVIDIA_PCI_VENDOR and kind.startswith(_DISPLAY_PCI_CLASS)
    return count


def name_of_process(pid: int) -> str:
    """Command name of a process; says so where it is not to be seen from here."""
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "not visible here"


def check_gpus(
    inventory: Inventory, name_of: Callable[[int], str] = name_of_process
) -> list[Finding]:
    """A finding for each GPU that a server would use."""
    able = [gpu for gpu in inventory.gpus if gpu.capability >= MIN_COMPUTE_CAPABILITY]
    return [
        check_gpu(gpu, inventory.holders.get(gpu.uuid, ()), name_of, is_only=not able)
        for gpu in inventory.gpus
    ]


def _holder(holder: Holder, name_of: Callable[[int], str]) -> str:
    used = "" if holder.used_bytes is None else f", {size(holder.used_bytes)}"
    return f"pid {holder.pid} ({name_of(holder.pid)}{used})"
