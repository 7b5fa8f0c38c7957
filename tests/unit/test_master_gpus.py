"""Which GPUs may be used, on a faked NVML: by index, UUID, shortened UUID, and slices under MIG."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.gpu_box import (
    GIB,
    FakeNvml,
    NVMLError,
    NVMLErrorDriverNotLoaded,
    NVMLErrorLibraryNotFound,
)
from tinfer.errors import StartError
from tinfer.master.gpus import VARIABLE, select, usable_gpus

WHOLE = [{"uuid": f"GPU-{letter}{letter}11"} for letter in "abcd"]
SLICED = {
    "uuid": "GPU-ee11",
    "slices": [
        {"uuid": "MIG-1111", "total": 20 * GIB, "free": 19 * GIB},
        {"uuid": "MIG-1122", "total": 40 * GIB},
    ],
}
BOX = FakeNvml(*WHOLE, SLICED)


def uuids(value: str | None, nvml: FakeNvml = BOX) -> list[str]:
    environ = {} if value is None else {VARIABLE: value}
    found = [gpu.uuid for gpu in usable_gpus(nvml, environ)]
    assert nvml.num_open == 0
    return found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, ["GPU-aa11", "GPU-bb11", "GPU-cc11", "GPU-dd11", "MIG-1111", "MIG-1122"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", ["GPU-cc11", "GPU-aa11"]),
        (" 1 , GPU-dd11 ", ["GPU-bb11", "GPU-dd11"]),
        ("GPU-c", ["GPU-cc11"]),
        ("1,-1,2", ["GPU-bb11"]),
        ("MIG-1122", ["MIG-1122"]),
    ],
)
def test_the_environment_says_which(value: str | None, found: list[str]) -> None:
    assert uuids(value) == found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("7", "there is no GPU 7; to be had: 0, 1, 2, 3, MIG-1111, MIG-1122"),
        ("GPU-x", "there is no GPU GPU-x"),
        ("gpu", "there is no GPU gpu"),
        ("GPU-", "is not one GPU but several: GPU-aa11"),
        ("MIG-11", "is not one GPU but several: MIG-1111, MIG-1122"),
        ("4", "4 is not one GPU but several: MIG-1111, MIG-1122"),
        ("0,GPU-aa11", "GPU GPU-aa11 is named twice"),
    ],
)
def test_a_name_that_fits_not_just_one_is_one_line(value: str, words: str) -> None:
    with pytest.raises(StartError, match=f"CUDA_VISIBLE_DEVICES: .*{words}") as caught:
        uuids(value)
    assert "\n" not in caught.value.message


def test_what_is_told_of_a_gpu_and_of_a_slice() -> None:
    nvml = FakeNvml({"uuid": "GPU-a", "name": "Big", "free": GIB, "capability": (7, 5)}, SLICED)
    whole, first, _ = usable_gpus(nvml, {})
    assert (whole.name, whole.model, whole.total_bytes, whole.free_bytes) == (
        "0",
        "Big",
        80 * GIB,
        GIB,
    )
    assert (whole.capability, whole.is_slice) == ((7, 5), False)
    assert (first.index, first.name, first.total_bytes) == (1, "MIG-1111", 20 * GIB)
    assert first.is_slice


def test_a_gpu_that_could_be_sliced_and_is_not_is_whole() -> None:
    nvml = FakeNvml({"uuid": "GPU-a", "mig": 0, "slices": [{"uuid": "MIG-1"}]})
    assert uuids(None, nvml) == ["GPU-a"]


@pytest.mark.parametrize("error", [NVMLErrorLibraryNotFound(), NVMLErrorDriverNotLoaded()])
@pytest.mark.parametrize("value", [None, "0"])
def test_without_a_driver_there_is_no_gpu_whatever_the_environment_says(
    error: NVMLError, value: str | None
) -> None:
    assert uuids(value, FakeNvml(init_error=error)) == []


def test_a_driver_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(StartError, match=r"does not answer: mismatch .*CUDA_VISIBLE_DEVICES=-1"):
        uuids(None, FakeNvml(init_error=NVMLError("mismatch")))
    nvml = FakeNvml({"uuid": "GPU-a", "broken": "fell off the bus"})
    with pytest.raises(StartError, match="fell off the bus"):
        uuids(None, nvml)
    assert nvml.num_open == 0


def test_hidden_gpus_are_not_even_asked_for() -> None:
    nvml: Any = object()
    assert usable_gpus(nvml, {VARIABLE: ""}) == []


def test_only_what_is_allowed_can_be_named() -> None:
    allowed = usable_gpus(BOX, {VARIABLE: "2,3"})
    assert [gpu.uuid for gpu in select(["3"], allowed, "--prefill-devices")] == ["GPU-dd11"]
    with pytest.raises(StartError, match="--prefill-devices: there is no GPU 0; to be had: 2, 3"):
        select(["0"], allowed, "--prefill-devices")
