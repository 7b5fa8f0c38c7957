"""The doctor's checks of machine, limits, memory, hub and port, on made-up boxes."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tinfer.cgroup import cpu_quota
from tinfer.doctor import hub, limits, machine, ports, shared_memory
from tinfer.doctor.finding import Finding, size
from tinfer.doctor.shared_memory import Copied, Room
from tinfer.master.host_memory import HostMemory

GIB = 1 << 30
AVX2 = "processor : 0\nflags\t\t: fpu avx avx2 fma\n"
NO_AVX2 = "processor : 0\nflags\t\t: fpu avx fma\n"
GLIBC = ("glibc", "2.36")


def level_and(finding: Finding, *words: str) -> str:
    """The level, once found and advice hold the words."""
    text = f"{finding.found} > {finding.advice}"
    assert [word for word in words if word not in text] == [], text
    assert bool(finding.advice) == (finding.level != "ok"), "advice where there is something to do"
    return finding.level


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_old_python_is_a_fault() -> None:
    assert level_and(machine.check_python((3, 13, 1), "/v/python"), "3.13.1", "/v/python") == "ok"
    old = machine.check_python((3, 10, 9), "/v/python")
    assert level_and(old, "3.10.9", "install Python 3.11") == "fault"


@pytest.mark.parametrize(
    ("system", "cpu", "libc", "cpuinfo", "has_gpu", "level"),
    [
        ("linux", "x86_64", GLIBC, AVX2, False, "ok"),
        ("linux", "aarch64", GLIBC, "", False, "ok"),
        ("linux", "x86_64", ("glibc", "2.4"), AVX2, False, "fault"),
        ("linux", "x86_64", ("", ""), AVX2, False, "fault"),
        ("linux", "ppc64le", GLIBC, "", False, "fault"),
        ("darwin", "x86_64", GLIBC, AVX2, False, "fault"),
        ("linux", "x86_64", GLIBC, NO_AVX2, False, "fault"),
        ("linux", "x86_64", GLIBC, NO_AVX2, True, "ok"),
    ],
)
def test_platforms(
    system: str, cpu: str, libc: tuple[str, str], cpuinfo: str, has_gpu: bool, level: str
) -> None:
    assert level_and(machine.check_platform(system, cpu, libc, cpuinfo, has_gpu), cpu) == level


def test_wsl_costs_something() -> None:
    release = "5.15.167.4-microsoft-standard-WSL2"
    assert level_and(machine.check_wsl("6.8.0-generic", True)) == "ok"
    assert level_and(machine.check_wsl(release, True), "spawned", "CUDA IPC") == "warning"
    assert "CUDA IPC" not in machine.check_wsl(release, False).advice


def test_the_compiler_matters_on_a_gpu_only(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    missing = machine.check_compiler(None, header, True)
    assert level_and(missing, "no C compiler", f"no {header}", "python3-dev") == "fault"
    assert level_and(machine.check_compiler(None, header, False), "not needed") == "ok"
    assert level_and(machine.check_compiler("/usr/bin/gcc", header, True), "Python.h") == "fault"
    header.touch()
    assert level_and(machine.check_compiler("/usr/bin/gcc", header, True), "gcc") == "ok"


def test_the_compiler_is_the_one_that_triton_would_take(tmp_path: Path) -> None:
    for name in ("gcc", "clang", "mycc"):
        (tmp_path / name).touch(mode=0o755)
    path = {"PATH": str(tmp_path)}
    assert machine.find_compiler(path) == str(tmp_path / "gcc")
    assert machine.find_compiler({**path, "CC": "mycc"}) == str(tmp_path / "mycc")
    assert machine.find_compiler({**path, "CC": "no-such-cc"}) is None
    (tmp_path / "gcc").unlink()
    assert machine.find_compiler(path) == str(tmp_path / "clang")
    (tmp_path / "clang").unlink()
    assert machine.find_compiler(path) is None


def test_memory_layout(tmp_path: Path) -> None:
    found = machine.check_memory_layout(tmp_path).found
    assert found == "one NUMA node, transparent huge pages: not in this kernel"
    for name in ("node0", "node1"):
        (tmp_path / "devices/system/node" / name).mkdir(parents=True)
    write(tmp_path, {"kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"})
    found = machine.check_memory_layout(tmp_path).found
    assert found == "2 NUMA nodes, transparent huge pages: madvise"


@pytest.mark.parametrize(
    ("hard", "level"),
    [(resource.RLIM_INFINITY, "ok"), (1 << 20, "ok"), (512, "warning"), (64, "fault")],
)
def test_open_files(hard: int, level: str) -> None:
    finding = limits.check_descriptors(64, hard)
    assert level_and(finding, "unlimited" if hard < 0 else str(hard)) == level
    if level != "ok":
        assert "LimitNOFILE" in finding.advice


def test_locked_memory_is_said_and_never_a_fault() -> None:
    assert "not needed" in limits.check_locked_memory(1 << 16, False).found
    assert "64 KiB" in limits.check_locked_memory(1 << 16, True).found
    assert limits.check_locked_memory(resource.RLIM_INFINITY, True).found == "unlimited"


V2_GROUP = {"self/cgroup": "0::/box/job\n"}


def test_a_quota_of_one_and_a_half_cores(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", V2_GROUP)
    groups = write(tmp_path / "v2", {"box/cpu.max": "150000 100000\n", "cpu.max": "max 100000\n"})
    finding = limits.check_cpus(range(8), 8, cpu_quota(proc, groups))
    assert level_and(finding, "8 of 8 cores", "quota of 1.5 cores", "--cpus") == "warning"


def test_cores() -> None:
    assert level_and(limits.check_cpus([0, 1], 8, None), "2 of 8 cores", "no time quota") == "ok"
    assert level_and(limits.check_cpus([3], 8, None), "1 of 8 cores") == "warning"
    assert level_and(limits.check_cpus(range(8), 8, 4.0), "4 cores") == "ok"


@pytest.mark.parametrize(
    ("free", "level"), [(16 * GIB, "ok"), (2 * GIB, "warning"), (GIB, "fault"), (0, "fault")]
)
def test_memory_is_what_the_tightest_limit_leaves(free: int, level: str) -> None:
    memory = HostMemory(32 * GIB, free, "the cgroup /box")
    assert level_and(limits.check_memory(memory), "of 32 GiB free (the cgroup /box)") == level


@pytest.mark.parametrize(
    ("room", "level", "words"),
    [
        (Room(16 * GIB, 16 * GIB), "ok", "16 GiB of 16 GiB free"),
        (Room(64 << 20, 64 << 20), "warning", "64 MiB of 64 MiB free, a container's default"),
        (Room(16 * GIB, 1 << 20), "warning", "1 MiB of 16 GiB free"),
        (None, "warning", "missing"),
    ],
)
def test_a_small_dev_shm_names_what_needs_it(room: Room | None, level: str, words: str) -> None:
    finding = shared_memory.check_shm(room)
    assert level_and(finding, words) == level
    assert level == "ok" or "only --tensor-parallel-size above 1" in finding.advice


def test_room_of_a_path_that_is_missing(tmp_path: Path) -> None:
    assert shared_memory.room_of(tmp_path / "no") is None
    assert shared_memory.room_of(tmp_path) is not None


def test_shared_memory() -> None:
    check: Callable[..., Finding] = shared_memory.check_memory_between_processes
    assert level_and(check(Copied(digest="x", gb_per_s=12.34), "x", ""), "12.3 GB/s") == "ok"
    assert level_and(check(Copied(digest="x", gb_per_s=12.34), "y", ""), "bytes") == "fault"
    denied = check(Copied(error="Permission denied"), "x", "hidepid=2")
    assert level_and(denied, "Permission denied (hidepid=2)", "without hidepid") == "fault"


def test_a_probe_that_cannot_read_says_so_and_closes_its_memory() -> None:
    before = os.listdir("/proc/self/fd")
    finding = shared_memory.probe(1 << 20, lambda fd, num_bytes: Copied(error="no"))
    assert (finding.level, finding.found[:20]) == ("fault", "cannot be opened: no")
    assert os.listdir("/proc/self/fd") == before


def test_hardening(tmp_path: Path) -> None:
    assert shared_memory.describe_hardening(tmp_path) == ""
    mounts = "proc /proc proc rw,nosuid,hidepid=2 0 0\ntmpfs /tmp tmpfs rw,hidepid=9 0 0\n"
    write(tmp_path, {"self/mounts": mounts, "sys/kernel/yama/ptrace_scope": "1\n"})
    assert shared_memory.describe_hardening(tmp_path) == "hidepid=2, ptrace_scope=1"


def test_the_hub_never_shows_its_token(tmp_path: Path) -> None:
    secret = "hf_secret"
    environ = {"HF_HOME": str(tmp_path), "HF_TOKEN": secret, "HF_HUB_OFFLINE": "1"}
    found = hub.check_hub(environ).found
    assert secret not in found
    assert f"HF_HOME {tmp_path}; HF_TOKEN set; HF_HUB_OFFLINE set" in found
    (tmp_path / "token").write_text(secret)
    found = hub.check_hub({"HF_HOME": str(tmp_path)}).found
    assert found == f"HF_HOME {tmp_path}; HF_TOKEN not set, but a login is stored"


def test_where_models_are_kept() -> None:
    assert hub.cache_folder({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")
    assert hub.cache_folder({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub.cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub.cache_folder({}) == Path("~/.cache/huggingface/hub").expanduser()


@pytest.mark.parametrize(
    ("room", "is_writable", "level"),
    [
        (Room(10**12, 10**12), True, "ok"),
        (Room(10**12, 10**10), True, "warning"),
        (Room(10**12, 10**9), True, "warning"),
        (Room(10**12, 10**12), False, "warning"),
        (None, True, "fault"),
    ],
)
def test_the_model_cache(room: Room | None, is_writable: bool, level: str) -> None:
    finding = hub.check_cache(Path("/h/hub"), Path("/h"), room, is_writable)
    assert level_and(finding, "/h/hub") == level
    assert level == "ok" or "HF_HOME" in finding.advice


def test_the_cache_folder_need_not_exist(tmp_path: Path) -> None:
    _, cache = hub.check_this_hub({"HF_HOME": str(tmp_path / "not" / "yet")})
    assert cache.level != "fault"


def test_the_port() -> None:
    used = OSError(errno.EADDRINUSE, "in use")
    serving = ["/v/python", "-P", "-m", "tinfer", "serve", "--port", "8000"]
    check = ports.check_port
    assert level_and(check(8000, None, None, ()), "8000 is free") == "ok"
    assert level_and(check(8000, used, 7, ["nginx"]), "pid 7 (nginx)", "--port") == "warning"
    assert level_and(check(8000, used, 7, serving), "a tinfer server listens there (pid 7)") == "ok"
    assert level_and(check(8000, used, None, ()), "another user's") == "warning"
    denied = OSError(errno.EACCES, "Permission denied")
    assert level_and(check(80, denied, None, ()), "Permission denied") == "warning"


def test_sizes_are_short() -> None:
    assert [size(n) for n in (0, 900, 64 << 20, 3 * GIB // 2, 900 * GIB, 1 << 41)] == [
        "0 B",
        "900 B",
        "64 MiB",
        "1.5 GiB",
        "900 GiB",
        "2 TiB",
    ]
