"""What is in the way of a start is named: port, process, device file, GPU.

There is no GPU here: NVML is a fake of the calls that are made, with the errors that it documents.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tinfer.core.types import Role
from tinfer.errors import StartError
from tinfer.master import conflicts
from tinfer.master.placement import Placement

GIB = 1 << 30
ME = f"process {os.getpid()} ({psutil.Process().name()})"


# --- ports ----------------------------------------------------------------------------------------


def test_the_listener_on_a_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert conflicts.port_holder("127.0.0.1", port) == os.getpid()
        assert conflicts.port_holder("localhost", port) == os.getpid()
        assert conflicts.port_holder("0.0.0.0", port) == os.getpid()
        assert conflicts.port_holder("127.0.0.2", port) is None
    assert conflicts.port_holder("127.0.0.1", port) is None


def test_a_listener_on_every_address_is_in_the_way_of_each() -> None:
    with socket.create_server(("", 0)) as taken:
        assert conflicts.port_holder("127.0.0.1", taken.getsockname()[1]) == os.getpid()


def test_a_port_in_use_is_said_with_its_holder() -> None:
    error = OSError(errno.EADDRINUSE, "Address already in use")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = conflicts.explain_address("127.0.0.1", port, error)
    assert line == (
        f"address 127.0.0.1:{port} is in use by {ME}; choose another --port, or 0 for a free one"
    )


@pytest.mark.parametrize("seen", [None, "error"])
def test_a_holder_that_cannot_be_seen_is_not_named(
    monkeypatch: pytest.MonkeyPatch, seen: str | None
) -> None:
    """Another user's sockets are listed without their process."""
    listed = SimpleNamespace(
        status=psutil.CONN_LISTEN, laddr=SimpleNamespace(ip="127.0.0.1", port=80), pid=None
    )

    def connections(_kind: str) -> list[Any]:
        if seen == "error":
            raise psutil.AccessDenied
        return [listed]

    monkeypatch.setattr(psutil, "net_connections", connections)
    line = conflicts.explain_address("127.0.0.1", 80, OSError(errno.EADDRINUSE, ""))
    assert line == "address 127.0.0.1:80 is in use; choose another --port, or 0 for a free one"


@pytest.mark.parametrize(
    ("host", "number", "line"),
    [
        ("127.0.0.1", errno.EACCES, "port 80 is for privileged users only; choose a --port from "),
        (
            "203.0.113.1",
            errno.EADDRNOTAVAIL,
            "address 203.0.113.1:80 is none of this machine's; choose another --host",
        ),
        ("::1", errno.EAFNOSUPPORT, "address [::1]:80 cannot be used: "),
    ],
)
def test_other_reasons_not_to_listen(host: str, number: int, line: str) -> None:
    assert conflicts.explain_address(host, 80, OSError(number, "why")).startswith(line)


def test_a_process_that_is_gone_has_no_name() -> None:
    assert conflicts.name_process(1 << 30) == f"process {1 << 30}"


# --- device files ---------------------------------------------------------------------------------


def test_files_that_may_be_opened_or_do_not_exist_are_fine(tmp_path: Path) -> None:
    there = tmp_path / "nvidiactl"
    there.touch()
    conflicts.check_device_files([there, tmp_path / "nowhere"])


def test_a_file_that_may_not_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the open itself, since a container's device rules show only there (and root may
    open everything)."""

    def refuse(path: object, _flags: int) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StartError) as caught:
        conflicts.check_device_files(["/dev/nvidiactl"])
    assert caught.value.message.startswith(
        "no permission for /dev/nvidiactl: Operation not permitted; "
    )


def test_the_files_that_all_need_are_looked_at_unless_the_gpus_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: object, _flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(StartError, match=r"^no permission for /dev/nvidiactl: "):
        conflicts.check_device_files()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    conflicts.check_device_files()


# --- memory ---------------------------------------------------------------------------------------


class Nvml:
    """Two GPUs of 80 GiB; `free` and `holders` by UUID."""

    class NVMLError(Exception):
        pass

    def __init__(self, free_gib: dict[str, float], holders: list[tuple[int, int | None]]) -> None:
        self._free_gib = free_gib
        self._holders = holders
        self.num_open = 0
        self.fails = False

    def nvmlInit(self) -> None:
        if self.fails:
            raise self.NVMLError("Unknown Error")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMinorNumber(self, handle: str) -> int:
        if handle.startswith("MIG-"):
            raise self.NVMLError("Invalid Argument")
        return 987  # a device that no machine has

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB, free=int(self._free_gib[handle] * GIB))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._holders]


def on(*uuids: str, share: float = 0.9, num_own: int = 1) -> Placement:
    names = tuple(str(i) for i, _ in enumerate(uuids[:num_own]))
    return Placement(
        worker_id="prefill-0",
        role=Role.PREFILL,
        device="cuda",
        devices=uuids,
        gpu_names=names,
        tensor_parallel_size=num_own,
        memory_share=share,
    )


def test_gpus_with_enough_free_memory_pass() -> None:
    nvml = Nvml({"GPU-a": 79, "GPU-b": 10}, [(1, GIB)])
    conflicts.check_gpus([on("GPU-a", "GPU-b")], nvml)  # the peer's memory is its own matter
    conflicts.check_gpus([], Nvml({}, []))
    assert nvml.num_open == 0


def test_a_held_gpu_is_named_with_its_holders_largest_first() -> None:
    nvml = Nvml({"GPU-a": 49}, [(1 << 30, GIB), (os.getpid(), 30 * GIB)])
    with pytest.raises(StartError) as caught:
        conflicts.check_gpus([on("GPU-a")], nvml)
    assert caught.value.message == (
        "GPU 0: 49.0 of 80.0 GiB are free, 72.0 GiB wanted; "
        f"{ME} holds 30.0 GiB, process {1 << 30} holds 1.0 GiB; "
        "end what holds it or lower --gpu-memory-utilization"
    )
    assert nvml.num_open == 0


@pytest.mark.parametrize(
    ("holders", "words"),
    [
        ([], "31.0 GiB are held by processes that cannot be seen from here"),
        ([(os.getpid(), None)], f"31.0 GiB are held by {ME}"),
    ],
)
def test_holders_that_the_driver_does_not_tell(
    holders: list[tuple[int, int | None]], words: str
) -> None:
    with pytest.raises(StartError) as caught:
        conflicts.check_gpus([on("GPU-a")], Nvml({"GPU-a": 49}, holders))
    assert f"72.0 GiB wanted; {words}; end what" in caught.value.message


def test_workers_on_one_gpu_need_their_sum() -> None:
    two = [on("GPU-a", share=0.45), on("GPU-a", share=0.45)]
    conflicts.check_gpus(two, Nvml({"GPU-a": 72}, []))
    with pytest.raises(StartError, match=r"72\.0 GiB wanted"):
        conflicts.check_gpus(two, Nvml({"GPU-a": 71}, []))


def test_every_gpu_of_a_tensor_parallel_worker_counts() -> None:
    with pytest.raises(StartError, match=r"^GPU 1: "):
        conflicts.check_gpus(
            [on("GPU-a", "GPU-b", num_own=2)], Nvml({"GPU-a": 79, "GPU-b": 10}, [])
        )


def test_a_slice_has_no_device_file_of_its_own() -> None:
    conflicts.check_gpus([on("MIG-a")], Nvml({"MIG-a": 79}, []))


def test_a_gpus_own_file_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, _flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StartError, match=r"^no permission for /dev/nvidia987: Permission denied"):
        conflicts.check_gpus([on("GPU-a")], Nvml({"GPU-a": 79}, []))


def test_a_driver_that_does_not_answer_is_said() -> None:
    nvml = Nvml({}, [])
    nvml.fails = True
    with pytest.raises(StartError, match="does not answer: Unknown Error"):
        conflicts.check_gpus([on("GPU-a")], nvml)
