"""What /proc/cpuinfo tells of a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinfer.master.host_cpu import halves_are_slow

BEFORE = "processor\t: 0\nvendor_id\t: AuthenticAMD\n"


@pytest.mark.parametrize(
    ("text", "is_slow"),
    [
        (BEFORE + "flags\t\t: fpu sse2 avx avx2 fma\n", True),
        (BEFORE + "flags\t\t: fpu sse2 avx avx2 fma avx512f avx512_bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),  # an Arm CPU
        ("", False),
    ],
)
def test_sixteen_bits_without_avx_512(text: str, is_slow: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert halves_are_slow(tmp_path) is is_slow


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert halves_are_slow(tmp_path / "none") is False
