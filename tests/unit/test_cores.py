"""Cores are claimed once per box, within affinity and quota, and shared out loud."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinfer.cgroup import cpu_quota
from tinfer.master.cores import CoreClaims, UsableCores, usable_cores

Claimer = Callable[..., CoreClaims]


@pytest.fixture
def claimer() -> Iterator[Claimer]:
    """Makes servers of one box of its own: the names that real ones take are left alone."""
    prefix = f"tinfer-test-{uuid.uuid4().hex}-"
    made: list[CoreClaims] = []

    def make(num_cores: int, num_usable: int | None = None) -> CoreClaims:
        usable = num_cores if num_usable is None else num_usable
        made.append(CoreClaims(UsableCores(tuple(range(num_cores)), usable), prefix))
        return made[-1]

    yield make
    for claims in made:
        claims.close()


def test_two_servers_take_different_cores(claimer: Claimer) -> None:
    first, second = claimer(4), claimer(4)
    assert first.take(2) == [0, 1]
    assert second.take(2) == [2, 3]
    assert first.notes == second.notes == []


def test_cores_of_a_server_that_ended_are_free_again(claimer: Claimer) -> None:
    first, second = claimer(2), claimer(2)
    first.take(2)
    first.close()
    first.close()
    assert second.take(2) == [0, 1]
    assert second.notes == []


def test_cores_of_a_process_that_was_killed_are_free_again(claimer: Claimer) -> None:
    claims = claimer(1)
    code = (
        "import socket, sys\n"
        f"s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind('\\0{claims._prefix}0')\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert claims.take(1) == [0]
        assert claims.notes == ["too few free cores: shares core 0 with another tinfer"]
        process.kill()
        process.wait()
    later = claimer(1)
    assert later.take(1) == [0]
    assert later.notes == []


def test_too_few_free_cores_are_shared_with_the_other_server_and_it_is_said(
    claimer: Claimer,
) -> None:
    first, second = claimer(3), claimer(3)
    first.take(2)
    assert second.take(2) == [2, 0]
    assert second.notes == ["too few free cores: shares core 0 with another tinfer"]


def test_more_workers_than_cores_share_them_and_it_is_said(claimer: Claimer) -> None:
    claims = claimer(2)
    assert claims.take(5) == [0, 1, 0, 1, 0]
    assert claims.notes == ["2 usable cores are too few: workers share them"]


def test_a_range_takes_all_that_are_free_and_no_others(claimer: Claimer) -> None:
    first, second = claimer(6), claimer(6)
    first.take(2)
    assert second.take(1, 6) == [2, 3, 4, 5]
    assert second.notes == []


def test_a_quota_bounds_how_many_cores_are_taken_not_which(claimer: Claimer) -> None:
    first, second = claimer(8, 2), claimer(8, 2)
    assert first.take(1, 8) == [0, 1]
    assert second.take(2) == [2, 3]
    assert second.take(1) == [2]
    assert second.notes == ["2 usable cores are too few: workers share them"]


def test_with_one_usable_core_a_borrowed_one_is_all_there_is(claimer: Claimer) -> None:
    first, second = claimer(1), claimer(1)
    first.take(1)
    assert second.take(2) == [0, 0]
    assert len(second.notes) == 2


# --- quota ----------------------------------------------------------------------------------------


class Kernel:
    """Files as the kernel would show them."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)

    def membership(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def file(self, path: str, text: str) -> None:
        file = self.cgroups / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    @property
    def quota(self) -> float | None:
        return cpu_quota(self.proc, self.cgroups)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_no_cgroup_is_no_quota(kernel: Kernel) -> None:
    assert kernel.quota is None
    kernel.membership("0::/")
    kernel.file("cpu.max", "max 100000\n")
    assert kernel.quota is None


def test_the_tightest_level_of_v2_counts(kernel: Kernel) -> None:
    kernel.membership("0::/a b/c")
    kernel.file("a b/cpu.max", "150000 100000\n")
    kernel.file("a b/c/cpu.max", "400000 100000\n")
    assert kernel.quota == 1.5


def test_a_path_that_is_not_mounted_in_the_container_leaves_the_root(kernel: Kernel) -> None:
    kernel.membership("0::/docker/0123")
    kernel.file("cpu.max", "250000 100000")
    assert kernel.quota == 2.5


def test_v1(kernel: Kernel) -> None:
    kernel.membership("4:memory:/x", "3:cpu,cpuacct:/x", "1:name=systemd:/:y")
    kernel.file("cpu/cpu.cfs_quota_us", "-1\n")
    kernel.file("cpu/cpu.cfs_period_us", "100000\n")
    assert kernel.quota is None
    kernel.file("cpu/x/cpu.cfs_quota_us", "50000\n")
    kernel.file("cpu/x/cpu.cfs_period_us", "100000\n")
    assert kernel.quota == 0.5


def test_usable_cores_are_the_affinity_cut_by_the_quota_rounded_up(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {7, 3, 5, 4})
    assert usable_cores(kernel.proc, kernel.cgroups) == UsableCores((3, 4, 5, 7), 4)
    kernel.membership("0::/")
    for quota, num_usable in ((10_000, 1), (150_000, 2), (900_000, 4)):
        kernel.file("cpu.max", f"{quota} 100000")
        assert usable_cores(kernel.proc, kernel.cgroups) == UsableCores((3, 4, 5, 7), num_usable)
