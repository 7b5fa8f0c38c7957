"""Which worker gets which cores and engine arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tinfer.config import load
from tinfer.core.types import Role
from tinfer.master.cores import CoreClaims, UsableCores
from tinfer.master.placement import Placement, on_cpu, worker_spec
from tinfer.wire.control import WorkerSpec

GPU = Placement(
    worker_id="decode-0",
    role=Role.DECODE,
    device="cuda",
    devices=("GPU-c", "GPU-d", "GPU-a"),
    gpu_names=("2", "3"),
    tensor_parallel_size=2,
    memory_share=0.45,
)


@pytest.fixture
def claims(request: pytest.FixtureRequest) -> Iterator[CoreClaims]:
    """Cores 2, 4, 5 and 6 unless told otherwise; names no other test takes."""
    numbers = getattr(request, "param", (2, 4, 5, 6))
    claims = CoreClaims(UsableCores(numbers, len(numbers)), prefix=f"tinfer-{request.node.name}-")
    yield claims
    claims.close()


def cpus(placements: list[Placement]) -> list[tuple[str, tuple[int, ...], int]]:
    return [(p.worker_id, p.cpus, p.num_threads) for p in placements]


def test_the_default_is_one_prefill_and_one_decode_worker_of_one_thread(
    claims: CoreClaims,
) -> None:
    placements = on_cpu(load({}), 1, claims)
    assert cpus(placements) == [("prefill-0", (2,), 1), ("decode-0", (4,), 1)]
    assert [p.role for p in placements] == [Role.PREFILL, Role.DECODE]
    assert [p.label for p in placements] == ["core 2", "core 4"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [("prefill-0", (2, 4), 2), ("decode-0", (5, 6), 2)]),
        ({"decode": 0}, [("prefill-0", (2, 4, 5, 6), 4)]),
        (
            {"decode": 2},
            [("prefill-0", (2,), 1), ("decode-0", (4,), 1), ("decode-1", (5,), 1)],
        ),
        (
            {"tensor_parallel_size": 2},
            [("prefill-0", (2, 4), 1), ("decode-0", (5, 6), 1)],
        ),
        ({"decode": 0, "tensor_parallel_size": 2}, [("prefill-0", (2, 4, 5, 6), 2)]),
    ],
)
def test_a_users_model_gets_equal_shares_of_the_cores(
    claims: CoreClaims, values: dict[str, Any], expected: list[Any]
) -> None:
    assert cpus(on_cpu(load(values), None, claims)) == expected


def test_a_number_of_threads_may_be_asked_for(claims: CoreClaims) -> None:
    placements = on_cpu(load({}), 2, claims)
    assert cpus(placements) == [("prefill-0", (2, 4), 2), ("decode-0", (5, 6), 2)]
    assert [p.label for p in placements] == ["cores 2,4", "cores 5-6"]


@pytest.mark.parametrize("num_threads", [1, None])
def test_more_workers_than_cores_share_them(claims: CoreClaims, num_threads: int | None) -> None:
    placements = on_cpu(load({"prefill": 3, "decode": 3}), num_threads, claims)
    assert [p.cpus for p in placements] == [(2,), (4,), (5,), (6,), (2,), (4,)]
    assert {p.num_threads for p in placements} == {1}
    assert claims.notes


def test_a_second_server_takes_what_the_first_has_left() -> None:
    cores = UsableCores((0, 1, 2), 3)
    first, second = (CoreClaims(cores, prefix="tinfer-two-servers-") for _ in range(2))
    try:
        assert cpus(on_cpu(load({"decode": 0}), 1, first)) == [("prefill-0", (0,), 1)]
        assert cpus(on_cpu(load({"decode": 0}), None, second)) == [("prefill-0", (1, 2), 2)]
    finally:
        first.close()
        second.close()


def spec(placement: Placement, **values: Any) -> WorkerSpec:
    return worker_spec(load(values), placement, 3, "/m", "/s", "/l", "shm")


def test_what_a_gpu_worker_is_told() -> None:
    told = spec(GPU, block_size=32, max_model_len=100, seed=4, lease_ttl=2.5)
    assert told.environment == {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-d,GPU-a"}
    assert (told.worker_id, told.generation, told.device) == ("decode-0", 3, "cuda")
    assert (told.cpus, told.lease_ttl_s, told.kv_transport) == ([], 2.5, "shm")
    assert (told.tensor_parallel_size, told.num_threads) == (2, 1)
    assert told.engine_args["block_size"] == 32
    assert told.engine_args["max_model_len"] == 100
    assert told.engine_args["seed"] == 4
    assert told.engine_args["gpu_memory_utilization"] == 0.45
    assert "kv_cache_memory_bytes" not in told.engine_args


def test_what_a_cpu_worker_is_told() -> None:
    placement = Placement(
        worker_id="prefill-0",
        role=Role.PREFILL,
        device="cpu",
        cpus=(4, 5, 4),
        num_threads=3,
        kv_bytes=12345,
    )
    told = spec(placement, engine="fake", fake_engine={"step_s": 0.5})
    assert (told.device, told.cpus, told.environment) == ("cpu", [4, 5], {})
    assert (told.num_threads, told.fake) == (3, {"step_s": 0.5})
    assert told.engine_args["kv_cache_memory_bytes"] == 12345
    assert told.engine_args.keys().isdisjoint({"block_size", "max_model_len"})


def test_a_step_has_room_for_every_sequence() -> None:
    told = spec(GPU, max_num_seqs=300, max_num_batched_tokens=64)
    assert told.engine_args["max_num_batched_tokens"] == 300


def test_labels() -> None:
    assert GPU.label == "GPU 2+3"
    assert Placement(worker_id="w", role=Role.BOTH, device="cpu").label == "CPU"
    many = Placement(worker_id="w", role=Role.BOTH, device="cpu", cpus=(0, 1, 2, 8, 2))
    assert many.label == "cores 0-2,8"
