"""The machine below everything: Python, platform, WSL, memory layout, C compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from tinfer.doctor.finding import Finding, fault, ok, warning

# Source: requires-python in pyproject.toml.
MIN_PYTHON = (3, 11)
# Source: the wheels that bin/setup installs; see MIN_GLIBC in bin/lib/machine_check.py.
MIN_GLIBC = (2, 31)
MACHINES = ("x86_64", "aarch64")


def check_python(version: tuple[int, ...], executable: str) -> Finding:
    """Python itself; `version` as (major, minor, micro)."""
    words = f"{'.'.join(map(str, version))} at {executable}"
    if version < MIN_PYTHON:
        need = ".".join(map(str, MIN_PYTHON))
        return fault("python", words, f"install Python {need} or newer and run bin/setup again")
    return ok("python", words)


def check_platform(
    system: str, machine: str, libc: tuple[str, str], cpuinfo: str, has_gpu: bool
) -> Finding:
    """Linux with a recent glibc; AVX2 where the CPU computes (`cpuinfo` as in /proc)."""
    words = f"{system} on {machine}, {' '.join(libc).strip() or 'unknown C library'}"
    if system != "linux" or machine not in MACHINES:
        return fault("platform", words, f"tinfer runs on Linux on {' or '.join(MACHINES)}")
    need = ".".join(map(str, MIN_GLIBC))
    if libc[0] != "glibc" or _numbers(libc[1]) < MIN_GLIBC:
        return fault("platform", words, f"PyTorch needs glibc {need} or newer: use a newer system")
    if machine == "x86_64" and not re.search(r"^flags\s*:.*\bavx2\b", cpuinfo, re.MULTILINE):
        if has_gpu:
            return ok("platform", f"{words}, without AVX2: fit for GPU workers only")
        return fault(
            "platform", f"{words}, without AVX2", "vLLM's CPU kernels need AVX2: use a newer CPU"
        )
    return ok("platform", words)


def check_wsl(release: str, has_gpu: bool) -> Finding:
    """The Windows Subsystem for Linux, told by the kernel's release."""
    if "microsoft" not in release.lower():
        return ok("WSL", "no, a Linux kernel of its own")
    costs = ["workers are spawned, not forked: each start takes the whole time of the imports"]
    if has_gpu:
        costs.append("CUDA IPC is missing there: KV blocks go through host memory")
    return warning("WSL", f"kernel {release}", f"{'; '.join(costs)}; native Linux has neither")


def check_memory_layout(sys_root: Path = Path("/sys")) -> Finding:
    """NUMA nodes and transparent huge pages: nothing to repair, but explains bandwidth."""
    nodes = sorted((sys_root / "devices/system/node").glob("node[0-9]*"))
    pages = "unknown"
    try:
        chosen = (sys_root / "kernel/mm/transparent_hugepage/enabled").read_text()
        if found := re.search(r"\[(\w+)\]", chosen):
            pages = found.group(1)
    except OSError:  # a kernel built without them
        pages = "not in this kernel"
    number = f"{len(nodes)} NUMA nodes" if len(nodes) > 1 else "one NUMA node"
    return ok("memory layout", f"{number}, transparent huge pages: {pages}")


def check_compiler(compiler: str | None, header: Path, has_gpu: bool) -> Finding:
    """The C compiler and Python.h, which Triton builds its launchers with at the first request."""
    missing = []
    if compiler is None:
        missing.append("no C compiler")
    if not header.is_file():
        missing.append(f"no {header}")
    if not missing:
        return ok("C compiler", f"{compiler}, {header}")
    words = ", ".join(missing)
    if not has_gpu:
        return ok("C compiler", f"{words}; not needed without a GPU")
    return fault(
        "C compiler",
        f"{words}: Triton needs both on a GPU",
        "install gcc and Python's headers (Debian, Ubuntu: apt install gcc python3-dev), or set CC",
    )


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """The compiler that Triton would take: CC where it is set, else gcc or clang.

    Source: triton/runtime/build.py, Triton 3.
    """
    names = (environ["CC"],) if environ.get("CC") else ("gcc", "clang")
    found = (shutil.which(name, path=environ.get("PATH")) for name in names)
    return next((path for path in found if path), None)


def check_this_machine(has_gpu: bool) -> list[Finding]:
    """All checks of this module on the machine at hand."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # another system; check_platform says so
        cpuinfo = ""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return [
        check_python(tuple(sys.version_info[:3]), sys.executable),
        check_platform(sys.platform, platform.machine(), platform.libc_ver(), cpuinfo, has_gpu),
        check_wsl(os.uname().release, has_gpu),
        check_compiler(find_compiler(os.environ), header, has_gpu),
        check_memory_layout(),
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
