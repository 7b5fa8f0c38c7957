"""What on this box is in the way of a start, and whose it is: one line, before any model loads.

The holder of a port or of GPU memory is named where it can be seen: another user's processes, or
those outside a container, often cannot.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pynvml

from tinfer.errors import StartError
from tinfer.master.placement import Placement

_GIB = 1 << 30
_WILDCARDS = frozenset({"0.0.0.0", "::", ""})
_UNPRIVILEGED_PORT_FILE = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
# Every CUDA process opens these two, and the file of each GPU that it uses.
CONTROL_FILES = ("/dev/nvidiactl", "/dev/nvidia-uvm")

_NO_GPUS = frozenset({"", "-1", "NoDevFiles"})


# --- ports ----------------------------------------------------------------------------------------


def explain_address(host: str, port: int, error: OSError) -> str:
    """Why a server cannot listen there, as one line for the user."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        holder = port_holder(host, port)
        by = "" if holder is None else f" by {name_process(holder)}"
        return f"address {address} is in use{by}; choose another --port, or 0 for a free one"
    if error.errno == errno.EACCES:
        first = _first_unprivileged_port()
        return f"port {port} is for privileged users only; choose a --port from {first} up"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"address {address} is none of this machine's; choose another --host"
    return f"address {address} cannot be used: {error}"


def port_holder(host: str, port: int) -> int | None:
    """The process that listens on a port in the way of `host`; None if it cannot be seen."""
    try:
        own = {socket.gethostbyname(host)} if ":" not in host else {host}
    except OSError:
        own = {host}
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        theirs = {connection.laddr.ip.removeprefix("::ffff:")}
        clashes = bool(theirs & own or (theirs | own) & _WILDCARDS)
        if connection.laddr.port == port and clashes and connection.pid is not None:
            return int(connection.pid)
    return None


def name_process(pid: int) -> str:
    """ "process 123 (python3)", without the command where it cannot be seen."""
    try:
        return f"process {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"process {pid}"


def _first_unprivileged_port() -> int:
    try:
        return int(_UNPRIVILEGED_PORT_FILE.read_text())
    except (OSError, ValueError):
        return 1024


# --- GPUs -----------------------------------------------------------------------------------------


def check_device_files(paths: Iterable[str | Path] | None = None) -> None:
    """Raises `StartError` naming the first file that exists and that this user may not open.

    By default those that every CUDA process needs, unless the user hides all GPUs: to be called
    before NVML is asked, which without them reports that there is no driver.
    """
    if paths is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in _NO_GPUS
        paths = () if hidden else CONTROL_FILES
    for path in paths:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError as error:
            raise StartError(
                f"no permission for {path}: {error.strerror}; add this user to its group, or hide "
                "the GPUs with CUDA_VISIBLE_DEVICES=-1"
            ) from error
        except OSError:  # not there, or not now: the driver says that better
            continue


def check_gpus(placements: Iterable[Placement], nvml: Any = pynvml) -> None:
    """Raises `StartError` for a GPU whose file may not be opened, or that has less free memory
    than all workers on it are to take; the line names the processes that hold it."""
    shares: dict[tuple[str, str], float] = {}
    for placement in placements:
        for key in zip(placement.own_devices, placement.gpu_names, strict=True):
            shares[key] = shares.get(key, 0.0) + (placement.memory_share or 0.0)
    if not shares:
        return
    try:
        nvml.nvmlInit()
        try:
            for (uuid, name), share in shares.items():
                _check_gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid), name, share)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise StartError(f"the NVIDIA driver does not answer: {error}") from error


def _check_gpu(nvml: Any, handle: Any, name: str, share: float) -> None:
    check_device_files(_device_file(nvml, handle))
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    wanted_bytes = share * memory.total
    if memory.free >= wanted_bytes:
        return
    holders = [(p.pid, p.usedGpuMemory) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    raise StartError(
        f"GPU {name}: {memory.free / _GIB:.1f} of {memory.total / _GIB:.1f} GiB are free, "
        f"{wanted_bytes / _GIB:.1f} GiB wanted; {_holders(holders, memory.total - memory.free)}; "
        "end what holds it or lower --gpu-memory-utilization"
    )


def _holders(holders: Sequence[tuple[int, int | None]], held_bytes: int) -> str:
    """Who holds it, largest first. The driver does not tell everyone the amounts, and in a
    container nobody the processes outside."""
    if not holders:
        return f"{held_bytes / _GIB:.1f} GiB are held by processes that cannot be seen from here"
    ordered = sorted(holders, key=lambda holder: -(holder[1] or 0))
    if any(used is None for _, used in ordered):
        names = ", ".join(name_process(pid) for pid, _ in ordered)
        return f"{held_bytes / _GIB:.1f} GiB are held by {names}"
    return ", ".join(f"{name_process(p)} holds {(used or 0) / _GIB:.1f} GiB" for p, used in ordered)


def _device_file(nvml: Any, handle: Any) -> Iterator[str]:
    try:
        yield f"/dev/nvidia{nvml.nvmlDeviceGetMinorNumber(handle)}"
    except nvml.NVMLError:  # a MIG slice has none of its own, and WSL has no such files
        return
