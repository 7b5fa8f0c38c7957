"""The doctor's GPU checks on made-up boxes: NVML and the peer probe are faked, no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tinfer.doctor import gpus, peers
from tinfer.doctor.finding import Finding
from tinfer.doctor.nvml import Holder, Inventory, read_inventory
from tinfer.doctor.peers import Pair, Tried
from tinfer.master.gpus import Gpu

GIB = 1 << 30
NEW_DRIVER = "580.65.06"


class FakeError(Exception):
    pass


class LibraryNotFound(FakeError):
    pass


class DriverNotLoaded(FakeError):
    pass


class FakeNvml:
    """NVML of a box with these GPUs; counts its own openings."""

    NVMLError = FakeError
    NVMLError_LibraryNotFound = LibraryNotFound
    NVMLError_DriverNotLoaded = DriverNotLoaded

    def __init__(self, gpus: Sequence[Gpu], driver: str = NEW_DRIVER) -> None:
        self.gpus = {gpu.uuid: gpu for gpu in gpus}
        self.driver = driver
        self.running: dict[str, list[Any]] = {}
        self.init_error: FakeError | None = None
        self.count_error: FakeError | None = None
        self.num_open = 0

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        if self.count_error is not None:
            raise self.count_error
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return list(self.gpus.values())[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        return self.gpus[uuid]

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return gpu.model

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> SimpleNamespace:
        return SimpleNamespace(total=gpu.total_bytes, free=gpu.free_bytes)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        return gpu.capability

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> tuple[int, int]:
        raise FakeError("Not Supported")

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[Any]:
        if gpu.uuid not in self.running:
            raise FakeError("Insufficient Permissions")
        return self.running[gpu.uuid]


def gpu(index: int = 0, **changes: Any) -> Gpu:
    plain = Gpu(index, f"GPU-{index}aaa", "NVIDIA H100", 80 * GIB, 79 * GIB, (9, 0))
    return msgspec.structs.replace(plain, **changes)


def box(num_gpus: int, **changes: Any) -> Inventory:
    found = tuple(gpu(i) for i in range(num_gpus))
    plain = Inventory(NEW_DRIVER, found, num_gpus)
    return msgspec.structs.replace(plain, **changes)


def level_and(finding: Finding, *words: str) -> str:
    """The level, once found and advice hold the words."""
    text = f"{finding.found} > {finding.advice}"
    assert [word for word in words if word not in text] == [], text
    assert bool(finding.advice) == (finding.level != "ok"), "advice where there is something to do"
    return finding.level


def name_of(pid: int) -> str:
    return f"name-{pid}"


def check_one(found: Gpu, *holders: Holder, is_only: bool = False) -> Finding:
    return gpus.check_gpu(found, holders, name_of, is_only)


# --- NVML -----------------------------------------------------------------------------------------


def test_reading_a_box_of_two_gpus_of_which_one_may_be_used() -> None:
    nvml = FakeNvml([gpu(0), gpu(1)])
    nvml.running["GPU-1aaa"] = [SimpleNamespace(pid=7, usedGpuMemory=GIB)]
    found = read_inventory(nvml, {"CUDA_VISIBLE_DEVICES": "1"})
    assert found == Inventory(NEW_DRIVER, (gpu(1),), 2, {"GPU-1aaa": (Holder(7, GIB),)})
    assert nvml.num_open == 0
    assert level_and(gpus.check_driver(found, 2), "hides 1 of 2 GPUs") == "ok"


def test_holders_that_may_not_be_seen() -> None:
    assert read_inventory(FakeNvml([gpu()]), {}).holders == {"GPU-0aaa": ()}


@pytest.mark.parametrize("error", [LibraryNotFound("no file"), DriverNotLoaded("no module")])
@pytest.mark.parametrize(("num_pci_gpus", "level"), [(0, "ok"), (2, "warning")])
def test_no_driver(error: FakeError, num_pci_gpus: int, level: str) -> None:
    """Only a box that has NVIDIA GPUs lacks something then."""
    nvml = FakeNvml([])
    nvml.init_error = error
    assert level_and(gpus.check_driver(read_inventory(nvml, {}), num_pci_gpus)) == level


def test_a_driver_that_does_not_answer() -> None:
    nvml = FakeNvml([])
    nvml.init_error = FakeError("GPU is lost")
    assert level_and(gpus.check_driver(read_inventory(nvml, {}), 1), "GPU is lost") == "fault"
    nvml.init_error, nvml.count_error = None, FakeError("Unknown Error")
    finding = gpus.check_driver(read_inventory(nvml, {}), 1)
    assert level_and(finding, NEW_DRIVER, "Unknown Error") == "fault"
    assert nvml.num_open == 0


def test_visible_devices_that_do_not_exist() -> None:
    found = read_inventory(FakeNvml([gpu(0)]), {"CUDA_VISIBLE_DEVICES": "3"})
    assert level_and(gpus.check_driver(found, 1), "there is no GPU 3") == "fault"


@pytest.mark.parametrize(
    ("inventory", "level", "word"),
    [
        (box(2), "ok", NEW_DRIVER),
        (box(2, driver="570.86.15"), "fault", "CUDA 13 needs 580 or newer"),
        (box(2, driver="579.99"), "fault", "579.99, CUDA 13"),
        (box(0), "warning", "lists no GPU"),
        (box(0, num_listed=4), "warning", "hides all 4 GPUs"),
    ],
)
def test_drivers(inventory: Inventory, level: str, word: str) -> None:
    assert level_and(gpus.check_driver(inventory, 4), word) == level


# --- GPUs -----------------------------------------------------------------------------------------


def test_a_free_gpu() -> None:
    finding = check_one(gpu(3))
    assert level_and(finding, "NVIDIA H100, 79 GiB of 80 GiB free, compute capability 9.0") == "ok"
    assert finding.check == "GPU 3"


def test_a_held_gpu_names_the_holders_and_the_share_that_is_left() -> None:
    finding = check_one(gpu(free_bytes=41 * GIB), Holder(71, 39 * GIB), Holder(72))
    words = ("held by pid 71 (name-71, 39 GiB), pid 72 (name-72)", "--gpu-memory-utilization 0.51")
    assert level_and(finding, *words) == "warning"
    full = check_one(gpu(free_bytes=GIB), Holder(71))
    assert level_and(full, "end what holds it") == "warning"
    assert "utilization" not in full.advice


def test_gpus_that_are_too_old() -> None:
    old = gpu(1, capability=(7, 0))
    inventory = box(0, gpus=(gpu(0), old))
    levels = [finding.level for finding in gpus.check_gpus(inventory, name_of)]
    assert levels == ["ok", "warning"]
    (alone,) = gpus.check_gpus(box(0, gpus=(old,)), name_of)
    assert level_and(alone, "7.0", "vLLM needs 7.5", "--device cpu") == "fault"


def test_a_mig_slice() -> None:
    finding = check_one(gpu(2, uuid="MIG-77", is_slice=True))
    assert (finding.check, finding.level) == ("GPU MIG-77", "ok")
    assert "a MIG slice of GPU 2" in finding.found


def test_device_files(tmp_path: Path) -> None:
    assert gpus.check_device_files({}) == []
    files = {"/dev/nvidia0": True, "/dev/nvidiactl": True, "/dev/nvidia-uvm": True}
    (finding,) = gpus.check_device_files(files)
    assert level_and(finding, "3 files") == "ok"
    (finding,) = gpus.check_device_files({**files, "/dev/nvidia0": False})
    assert level_and(finding, "no permission for /dev/nvidia0", "usermod") == "fault"
    del files["/dev/nvidia-uvm"]
    (finding,) = gpus.check_device_files(files)
    assert level_and(finding, "nvidia-uvm is missing", "nvidia-modprobe") == "warning"
    (tmp_path / "nvidia0").touch(mode=0o600)
    (tmp_path / "nvidia-caps").mkdir()
    assert gpus.read_device_files(tmp_path) == {str(tmp_path / "nvidia0"): True}


def test_pci_devices_are_told_apart(tmp_path: Path) -> None:
    devices = {
        "a": ("0x10de", "0x030200"),
        "b": ("0x10de", "0x040300"),
        "c": ("0x8086", "0x030000"),
    }
    for name, (vendor, kind) in devices.items():
        folder = tmp_path / "bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
    assert gpus.count_pci_gpus(tmp_path) == 1


# --- peers ----------------------------------------------------------------------------------------


class FakeProbe:
    """Answers for pairs of ordinals: GB/s, or why not; a pair in `deadly` takes its run down."""

    def __init__(self, deadly: Sequence[Pair] = (), refused: Mapping[Pair, str] | None = None):
        self.deadly = set(deadly)
        self.refused = dict(refused or {})
        self.runs: list[list[Pair]] = []
        self.environ: Mapping[str, str] = {}

    def __call__(
        self, pairs: Sequence[Pair], environ: Mapping[str, str], timeout_s: float
    ) -> list[Tried]:
        assert timeout_s > 0
        self.runs.append(list(pairs))
        self.environ = environ
        if self.deadly & set(pairs):
            return [Tried(False, "the probe ended with -11: no message", 0.0)] * len(pairs)
        return [
            Tried(False, self.refused[pair], 0.0)
            if pair in self.refused
            else Tried(True, "", 40.0 + pair[0])
            for pair in pairs
        ]


def probed(num_gpus: int, probe: FakeProbe) -> Finding:
    return peers.probe_peers([gpu(i) for i in range(num_gpus)], {"A": "b"}, probe)


def test_every_gpu_reads_every_other() -> None:
    probe = FakeProbe()
    finding = probed(4, probe)
    assert level_and(finding, "every GPU reads every other's memory, 40 to 43 GB/s") == "ok"
    assert len(probe.runs) == 1 and len(probe.runs[0]) == 12
    uuids = "GPU-0aaa,GPU-1aaa,GPU-2aaa,GPU-3aaa"
    assert probe.environ == {"A": "b", "CUDA_VISIBLE_DEVICES": uuids}
    rows = [re.split(r"\s{2,}", row.strip()) for row in finding.found.splitlines()[1:]]
    assert rows[0] == ["GB/s, owner \\ reader", "0", "1", "2", "3"]
    assert rows[1] == ["0", "-", "40", "40", "40"]
    assert rows[4] == ["3", "43", "43", "43", "-"]


def test_two_of_four_gpus_without_peer_access() -> None:
    probe = FakeProbe(refused={(1, 2): "no peer access", (2, 1): "no peer access"})
    finding = probed(4, probe)
    words = ("10 of 12 directions work; GPU 2 cannot read GPU 1: no peer access", "host memory")
    assert level_and(finding, *words, "--decode-devices") == "warning"
    assert [row.split()[-4:] for row in finding.found.splitlines()[3:5]] == [
        ["41", "-", "no", "41"],
        ["42", "no", "-", "42"],
    ]


def test_no_peer_access_at_all() -> None:
    refused = {pair: "IOMMU" for pair in peers.pairs_of(2)}
    finding = probed(2, FakeProbe(refused=refused))
    assert level_and(finding, "0 of 2 directions", "IOMMU", "--ipc=host") == "warning"


def test_one_gpu_that_takes_the_probe_down_does_not_hide_the_others() -> None:
    probe = FakeProbe(deadly=[(2, 0)])
    finding = probed(3, probe)
    assert level_and(finding, "4 of 6 directions work", "ended with -11") == "warning"
    assert [len(run) for run in probe.runs] == [6, 2, 2, 2]


def test_a_single_gpu_shares_with_itself() -> None:
    assert level_and(probed(1, FakeProbe()), "two processes share GPU 0's memory, 40") == "ok"
    alone = probed(1, FakeProbe(refused={(0, 0): "not permitted"}))
    assert level_and(alone, "not permitted", "two workers on one GPU only") == "warning"


def test_nothing_to_try() -> None:
    probe = FakeProbe()
    assert level_and(peers.probe_peers([], {}, probe), "no GPU") == "ok"
    slices = [gpu(0, uuid=f"MIG-{i}", is_slice=True) for i in range(2)]
    assert level_and(peers.probe_peers(slices, {}, probe), "MIG", "host memory") == "ok"
    assert probe.runs == []
