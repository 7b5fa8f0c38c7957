"""Shared memory: limits checked first, reserved, mapped by peers, nothing left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.unit.kv_box import ExporterProcess, geometry, open_files, random_bytes, shm_mappings
from tinfer.worker.kv.errors import KVMemoryError, PeerGone
from tinfer.worker.kv.memory import ShmBuffer, allocation_mode, attach, available_bytes
from tinfer.worker.kv.shm import ShmDescriptor, create_memfd, process_start_ticks

MIB = 1 << 20


def test_tensor_and_mapping_are_the_same_reserved_memory() -> None:
    files, mappings = open_files(), shm_mappings()
    buffer = ShmBuffer(4 * MIB)
    tensor = buffer.as_tensor()
    assert tensor.dtype == torch.int8 and tensor.shape == (4 * MIB,) and not tensor.any()
    reserved = os.stat(f"/proc/self/fd/{buffer.descriptor().fd}").st_blocks * 512
    assert reserved >= 4 * MIB, "not sparse"

    peer = attach(buffer.descriptor())
    tensor[5] = 7
    assert peer.mapping[5] == 7
    with pytest.raises(TypeError):
        peer.mapping[5] = 8  # read-only
    writable = attach(buffer.descriptor(), writable=True)
    writable.mapping[6] = 9
    assert tensor[6] == 9

    peer.close()
    writable.close()
    buffer.close()
    assert tensor[5] == 7, "a tensor outlives the buffer it came from"
    del tensor
    assert (open_files(), shm_mappings()) == (files, mappings)


def test_populating_maps_every_page_and_keeps_the_bytes() -> None:
    buffer = ShmBuffer(20 * MIB)
    tensor = buffer.as_tensor()
    tensor[: 3 * MIB] = 5
    thread = buffer.populate_in_background()
    assert buffer.populate_in_background() is thread
    thread.join()
    assert int(tensor.sum(dtype=torch.int64)) == 15 * MIB
    address = f"{tensor.data_ptr():x}-"
    smaps = Path("/proc/self/smaps").read_text()
    rss = smaps[smaps.index(address) :].split("Rss:", 1)[1].split()[0]
    assert int(rss) * 1024 >= 20 * MIB
    buffer.close()


def test_closing_stops_population() -> None:
    buffer = ShmBuffer(64 * MIB)
    thread = buffer.populate_in_background()
    buffer.close()
    assert not thread.is_alive()


def test_more_than_is_left_is_refused_by_the_name_of_the_limit() -> None:
    files = open_files()
    with pytest.raises(KVMemoryError, match=r"67108864 bytes.*100000000 left under /limit"):
        ShmBuffer(64 * MIB, available=lambda: (100_000_000, "/limit"))
    assert open_files() == files


def test_a_refusal_by_the_kernel_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    files = open_files()
    with pytest.raises(KVMemoryError, match="cannot reserve 4096 bytes: No space left"):
        create_memfd("kv", 4096)
    assert open_files() == files


def _machine(root: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "cgroups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "cgroups"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, (1_024_000, "MemAvailable")),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/b/memory.current": "5\n"}, (1_024_000, "")),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "max\n",
                "a/b/memory.current": "5\n",
                "a/memory.max": "5000\n",
                "a/memory.current": "3000\n",
                "a/memory.stat": "anon 1\ninactive_file 500\n",
            },
            (2500, "a/memory.max"),
        ),
        (
            "4:cpu,memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": "9000\n",
                "memory/job/memory.usage_in_bytes": "8000\n",
                "memory/job/memory.stat": "inactive_file 7\ntotal_inactive_file 100\n",
            },
            (1100, "memory/job/memory.limit_in_bytes"),
        ),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: tuple[int, str]
) -> None:
    left_bytes, limit = available_bytes(*_machine(tmp_path, cgroup, files))
    assert left_bytes == expected[0]
    assert limit.endswith(expected[1])


def test_this_machine_has_memory_left() -> None:
    assert available_bytes()[0] > 0


def test_only_the_first_kv_allocation_is_served() -> None:
    made: list[int] = []

    def make(num_bytes: int) -> torch.Tensor:
        made.append(num_bytes)
        return torch.full((num_bytes,), 3, dtype=torch.int8)

    with allocation_mode(make) as mode:
        others = [
            torch.zeros(2 * MIB, dtype=torch.uint8, device="cpu"),
            torch.zeros(2, MIB, dtype=torch.int8),
            torch.zeros(10, dtype=torch.int8),
            torch.zeros(2 * MIB, dtype=torch.int8, device="meta"),
            torch.zeros(2 * MIB, dtype=torch.int8, pin_memory=False),
        ]
        assert mode.allocated is None
        served = torch.zeros(2 * MIB, dtype=torch.int8, device=torch.device("cpu"))
        later = torch.zeros(2 * MIB, dtype=torch.int8, device="cpu")
    assert made == [2 * MIB]
    assert mode.allocated is served and bool((served == 3).all())
    assert not later.any() and not any(bool(t.any()) for t in others if t.device.type == "cpu")


@pytest.mark.parametrize("size", [2 * MIB, (2 * MIB,), [2 * MIB], torch.Size([2 * MIB])])
def test_every_spelling_of_the_size_is_served(size: object) -> None:
    with allocation_mode(lambda n: torch.ones(n, dtype=torch.int8)):
        assert bool(torch.zeros(size, dtype=torch.int8).all())  # type: ignore[call-overload]
    with allocation_mode(lambda n: torch.ones(n, dtype=torch.int8)):
        assert bool(torch.zeros(size=(2 * MIB,), dtype=torch.int8, device="cpu").all())


@pytest.fixture(scope="module")
def exporter() -> Iterator[ExporterProcess]:
    process = ExporterProcess(geometry(), seed=1)
    yield process
    process.close()


class TestAnotherProcess:
    def test_its_memory_outlives_it_and_cannot_be_opened_afterwards(self) -> None:
        layout = geometry()
        exporter = ExporterProcess(layout, seed=1)
        mapped = attach(exporter.memory)
        exporter.kill()
        copy = np.frombuffer(mapped.mapping, np.int8).copy()
        assert np.array_equal(copy, random_bytes(layout.total_bytes, 1))
        with pytest.raises(PeerGone):
            attach(exporter.memory)
        mapped.close()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"start_time_ticks": 1}, "its id was reused"),
            ({"inode": 1}, "not the memory that was described"),
            ({"size_bytes": 4096}, "not the memory that was described"),
            ({"fd": 0}, "not shared KV memory"),
            ({"fd": 999}, "No such file"),
        ],
    )
    def test_a_descriptor_that_names_something_else_is_refused(
        self, exporter: ExporterProcess, changes: dict[str, int], message: str
    ) -> None:
        files, mappings = open_files(), shm_mappings()
        wrong: ShmDescriptor = msgspec.structs.replace(exporter.memory, **changes)
        with pytest.raises(PeerGone, match=message):
            attach(wrong)
        assert (open_files(), shm_mappings()) == (files, mappings)

    def test_an_ended_process_has_no_start_time(self) -> None:
        exporter = ExporterProcess(geometry(), seed=1)
        assert process_start_ticks(exporter.pid) == exporter.memory.start_time_ticks
        exporter.kill()
        assert process_start_ticks(exporter.pid) is None
