"""Who gets which GPUs, on GPUs that are only descriptions: none of this has run on one here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.gpu_box import gpu, gpus
from tinfer.config import load
from tinfer.core.types import Role
from tinfer.errors import StartError
from tinfer.master.gpu_placement import GpuLayout, on_gpus
from tinfer.master.gpus import Gpu

TURING = (7, 5)
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def place(values: dict[str, Any], on: Sequence[Gpu]) -> GpuLayout:
    def dtype_of(one: Gpu) -> str:
        return "bfloat16" if one.capability >= (8, 0) else "float16"

    return on_gpus(load(values), on, dtype_of)


def seats(layout: GpuLayout) -> list[tuple[str, tuple[str, ...]]]:
    return [(p.worker_id, p.gpu_names) for p in layout.placements]


@pytest.mark.parametrize(
    ("num_gpus", "num_prefill", "num_decode"), [(2, 1, 1), (3, 2, 1), (4, 2, 2), (8, 4, 4)]
)
def test_the_default_is_an_even_split_with_the_odd_gpu_for_prefill(
    num_gpus: int, num_prefill: int, num_decode: int
) -> None:
    layout = place({}, gpus(num_gpus))
    roles = [p.role for p in layout.placements]
    assert roles == [P] * num_prefill + [D] * num_decode
    assert [p.gpu_names for p in layout.placements] == [(str(i),) for i in range(num_gpus)]
    assert {p.memory_share for p in layout.placements} == {0.9}
    assert any("split evenly" in reason for reason in layout.reasons)


def test_one_gpu_is_one_worker_for_both_phases() -> None:
    layout = place({}, gpus(1))
    (only,) = layout.placements
    assert (only.worker_id, only.role, only.label) == ("both-0", B, "GPU 0")
    assert only.memory_share == 0.9
    assert any("both phases on GPU 0" in reason for reason in layout.reasons)


@pytest.mark.parametrize("values", [{"prefill": 1, "decode": 1}, {"route": "split"}])
def test_two_workers_on_one_gpu_divide_its_memory(values: dict[str, Any]) -> None:
    layout = place({**values, "gpu_memory_utilization": 0.8}, gpus(1))
    assert seats(layout) == [("prefill-0", ("0",)), ("decode-0", ("0",))]
    assert [p.memory_share for p in layout.placements] == [0.4, 0.4]
    assert {p.devices for p in layout.placements} == {("GPU-0000",)}
    assert any("2 workers share GPU 0" in reason for reason in layout.reasons)


def test_every_worker_has_its_own_gpus_first_and_sees_those_of_its_peers() -> None:
    layout = place({"prefill": 1, "decode": 1}, gpus(4))
    assert [p.devices for p in layout.placements] == [
        ("GPU-0000", "GPU-0001"),
        ("GPU-0001", "GPU-0000"),
    ]
    wide = place({"tensor_parallel_size": 2}, gpus(4))
    assert seats(wide) == [("prefill-0", ("0", "1")), ("decode-0", ("2", "3"))]
    assert wide.placements[1].devices == ("GPU-0002", "GPU-0003", "GPU-0000", "GPU-0001")
    assert wide.placements[1].own_devices == ("GPU-0002", "GPU-0003")
    assert wide.placements[1].label == "GPU 2+3"


def test_a_slice_sees_only_itself() -> None:
    layout = place({}, gpus(2, is_slice=True))
    assert [p.devices for p in layout.placements] == [("MIG-0000",), ("MIG-0001",)]


def test_gpus_that_do_not_make_a_group_are_left_out_and_said_so() -> None:
    layout = place({"tensor_parallel_size": 2}, gpus(5))
    assert len(layout.placements) == 2
    assert any("GPU 4 left out: a worker takes 2" in reason for reason in layout.reasons)


@pytest.mark.parametrize(
    ("values", "num_prefill", "num_decode"),
    [
        ({"prefill": 1}, 1, 3),
        ({"decode": 1}, 3, 1),
        ({"prefill": 1, "decode": 2}, 1, 2),
        ({"prefill": 0}, 0, 4),
        ({"decode": 0, "prefill": 2}, 2, 0),
    ],
)
def test_counts_that_the_user_gives_are_kept(
    values: dict[str, Any], num_prefill: int, num_decode: int
) -> None:
    roles = [p.role for p in place(values, gpus(4)).placements]
    assert roles == [P] * num_prefill + [D] * num_decode


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prefill": 2, "decode": 3}, "5 workers need 5 GPUs, 4 can be had"),
        (
            {"prefill": 2, "decode": 1, "tensor_parallel_size": 2},
            "3 workers need 6 GPUs, 4 can be had",
        ),
        ({"tensor_parallel_size": 8}, "--tensor-parallel-size 8: no 4 like GPUs can be had"),
        ({"prefill_devices": "0,9"}, "--prefill-devices: there is no GPU 9"),
        ({"prefill_devices": "0,1", "decode_devices": "1"}, "GPU 1 is in --prefill-devices and in"),
        (
            {"prefill_devices": "0", "tensor_parallel_size": 2},
            "names 1 GPUs, and each worker takes",
        ),
        ({"prefill_devices": "0,1", "prefill": 1}, "--prefill 1 and the GPUs for 2"),
        ({"prefill_devices": "0,1,2", "decode": 2}, "--decode 2 and the GPUs for 1"),
        ({"decode_devices": ""}, "--decode-devices: there is no GPU ;"),
        ({"prefill_devices": "0,1,2,3", "route": "split"}, "needs a prefill and a decode worker"),
    ],
)
def test_what_cannot_be_placed_is_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(StartError) as caught:
        place(values, gpus(4))
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"prefill_devices": "2", "decode_devices": "GPU-0000,3"},
            [("prefill-0", ("2",)), ("decode-0", ("0",)), ("decode-1", ("3",))],
        ),
        (
            {"prefill_devices": "3", "decode": 1},
            [("prefill-0", ("3",)), ("decode-0", ("0",))],
        ),
        (
            {"decode_devices": "1,0", "tensor_parallel_size": 2},
            [("prefill-0", ("2", "3")), ("decode-0", ("1", "0"))],
        ),
    ],
)
def test_named_gpus_imply_the_workers(
    values: dict[str, Any], expected: list[tuple[str, tuple[str, ...]]]
) -> None:
    assert seats(place(values, gpus(4))) == expected


MIXED = [gpu(0, capability=TURING), gpu(1), gpu(2)]


def test_a_gpu_with_another_data_type_is_left_out_with_the_reason() -> None:
    layout = place({}, MIXED)
    assert seats(layout) == [("prefill-0", ("1",)), ("decode-0", ("2",))]
    (why,) = (reason for reason in layout.reasons if "left out" in reason)
    assert "GPU 0 left out: its KV dtype is float16 (compute capability 7.5), not bfloat16" in why


def test_a_gpu_with_another_attention_backend_is_left_out() -> None:
    layout = place({}, [gpu(0), gpu(1), gpu(2, capability=(10, 0))])
    assert seats(layout) == [("prefill-0", ("0",)), ("decode-0", ("1",))]
    assert any("GPU 2 left out: its KV layout" in reason for reason in layout.reasons)


def test_where_one_pair_can_work_the_odd_worker_is_not_paired() -> None:
    layout = place({"prefill": 1, "decode": 2}, MIXED)
    assert seats(layout)[2] == ("decode-1", ("0",))
    assert any("decode-1 is not paired" in reason for reason in layout.reasons)


def test_where_no_pair_can_work_every_worker_is_on_its_own() -> None:
    layout = place({"prefill": 1, "decode": 1}, MIXED[:2])
    assert len(layout.placements) == 2
    (why,) = (reason for reason in layout.reasons if "every worker" in reason)
    assert "dtype" in why
    with pytest.raises(StartError, match="--route split: KV blocks of prefill-0 and decode-0 do"):
        place({"prefill": 1, "decode": 1, "route": "split"}, MIXED[:2])


def test_named_gpus_that_differ_are_not_paired_either() -> None:
    layout = place({"prefill_devices": "0", "decode_devices": "1,2"}, MIXED)
    assert any("every worker" in reason for reason in layout.reasons)
