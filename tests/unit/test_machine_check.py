"""bin/setup looks before it downloads: each reason not to go on is one line."""

from __future__ import annotations

from pathlib import Path

import machine_check
import pytest
from machine_check import CannotRun, Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", (9, 0))
V100 = Gpu("Tesla V100", "580.65.06", (7, 0))


def refusal(check: str, *arguments: object) -> str:
    with pytest.raises(CannotRun) as caught:
        getattr(machine_check, check)(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_this_kind_of_machine_passes() -> None:
    machine_check.check_system("x86_64", ("glibc", "2.36"))
    machine_check.check_cpu("x86_64", "processor: 0\nflags\t\t: fpu avx avx2 sse\n")
    machine_check.check_cpu("aarch64", "Features: fp asimd\n")
    machine_check.check_disk(Path("/"), 10, 10)
    assert machine_check.check_gpus([H100]) == []


def test_other_systems_are_refused() -> None:
    assert "needs Linux on x86_64" in refusal("check_system", "riscv64", ("glibc", "2.36"))
    assert "has 2.28" in refusal("check_system", "x86_64", ("glibc", "2.28"))
    assert "another C library" in refusal("check_system", "x86_64", ("", ""))
    assert "AVX2" in refusal("check_cpu", "x86_64", "flags\t\t: fpu avx sse\n")


def test_a_full_disk_is_refused() -> None:
    said = refusal("check_disk", Path("/data"), int(5.54e9), 20 * 10**9)
    assert said == "needs 20 GB of free disk at /data, which has 5.5 GB"


def test_old_drivers_and_gpus_are_refused() -> None:
    old = Gpu("NVIDIA H100", "535.104.05", (9, 0))
    assert "driver is 535.104.05, CUDA 13 needs 580" in refusal("check_gpus", [old])
    assert "compute capability 7.5" in refusal("check_gpus", [V100])
    assert "lists no GPU" in refusal("check_gpus", [])
    assert machine_check.check_gpus([H100, V100]) == [
        "cannot be used, compute capability below 7.5: Tesla V100"
    ]


def test_parses_what_nvidia_smi_prints() -> None:
    listing = "NVIDIA H100 80GB HBM3, 580.65.06, 9.0\nTesla, V100, 580.65.06, 7.0\nnonsense\n"
    assert machine_check.parse_gpus(listing) == [H100, Gpu("Tesla, V100", "580.65.06", (7, 0))]


@pytest.mark.parametrize(
    ("script", "device"),
    [
        ("echo 'NVIDIA L4, 580.65.06, 8.9'", "cuda"),
        ("echo 'No devices were found'; exit 6", "cpu"),
    ],
)
def test_asks_nvidia_smi(
    script: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine_check.detect_device() == device


def test_finds_the_file_system_of_the_download_cache(tmp_path: Path) -> None:
    assert machine_check.cache_folder({"UV_CACHE_DIR": str(tmp_path / "a" / "b")}) == tmp_path
    (tmp_path / "uv").mkdir()
    assert machine_check.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "uv"
