"""Which worker gets which device, core and engine arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tinfer.config import load
from tinfer.core.types import Role
from tinfer.errors import StartError
from tinfer.master import placement
from tinfer.master.placement import default_cpu_kv_bytes, place, visible_gpus, worker_spec


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f, 7")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {6, 2, 4})


@pytest.mark.parametrize(
    ("value", "names"),
    [("0,1", ["0", "1"]), ("", []), ("-1", []), (" 2 , MIG-a/1 ", ["2", "MIG-a/1"])],
)
def test_the_environment_says_which_gpus(
    monkeypatch: pytest.MonkeyPatch, value: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == names


@pytest.mark.parametrize("count", [None, 0, 2])
def test_without_the_environment_the_driver_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "gpus"
    for number in range(count or 0):
        (driver / f"0000:0{number}:00.0").mkdir(parents=True)
    if count == 0:
        driver.mkdir()
    monkeypatch.setattr(placement, "Path", lambda _path: driver)
    assert visible_gpus() == [str(number) for number in range(count or 0)]


@pytest.mark.usefixtures("gpus")
def test_every_worker_has_its_own_gpu_first_and_sees_the_others() -> None:
    placements = place(load({"prefill": 1, "decode": 2}))
    assert [(p.worker_id, p.role, p.device, p.devices) for p in placements] == [
        ("prefill-0", Role.PREFILL, "cuda", ("3", "GPU-5f", "7")),
        ("decode-0", Role.DECODE, "cuda", ("GPU-5f", "3", "7")),
        ("decode-1", Role.DECODE, "cuda", ("7", "3", "GPU-5f")),
    ]
    assert [p.label for p in placements] == ["GPU 3", "GPU GPU-5f", "GPU 7"]


@pytest.mark.usefixtures("gpus")
def test_more_workers_than_gpus_is_an_error() -> None:
    with pytest.raises(StartError, match="4 workers need 4 GPUs, 3 visible"):
        place(load({"prefill": 2, "decode": 2}))


@pytest.mark.usefixtures("gpus")
def test_the_fake_engine_needs_no_gpu() -> None:
    placements = place(load({"prefill": 4, "decode": 4, "engine": "fake"}))
    assert {p.device for p in placements} == {"cpu"}


@pytest.mark.usefixtures("cores")
def test_cores_are_given_out_in_order_and_shared_when_there_are_too_few() -> None:
    placements = place(load({"prefill": 2, "decode": 2}))
    assert [(p.worker_id, p.cpus, p.label) for p in placements] == [
        ("prefill-0", (2,), "core 2"),
        ("prefill-1", (4,), "core 4"),
        ("decode-0", (6,), "core 6"),
        ("decode-1", (2,), "core 2"),
    ]


def spec(values: dict[str, Any], model_dir: str = "/m", index: int = 0) -> Any:
    config = load(values)
    return worker_spec(config, place(config)[index], 3, model_dir, "/s", "/l", "shm")


@pytest.mark.usefixtures("gpus")
def test_what_a_gpu_worker_is_told() -> None:
    told = spec({"block_size": 32, "max_model_len": 100, "seed": 4, "lease_ttl": 2.5}, index=1)
    assert told.environment == {"CUDA_VISIBLE_DEVICES": "GPU-5f,3,7"}
    assert (told.worker_id, told.generation, told.device) == ("decode-0", 3, "cuda")
    assert (told.cpus, told.lease_ttl_s, told.kv_transport) == ([], 2.5, "shm")
    assert told.engine_args["block_size"] == 32
    assert told.engine_args["max_model_len"] == 100
    assert told.engine_args["seed"] == 4
    assert "kv_cache_memory_bytes" not in told.engine_args


@pytest.mark.usefixtures("cores")
def test_what_a_cpu_worker_is_told() -> None:
    told = spec({"engine": "fake", "fake_engine": {"step_s": 0.5}}, index=1)
    assert (told.device, told.cpus, told.environment) == ("cpu", [4], {})
    assert told.fake == {"step_s": 0.5}
    assert told.engine_args.keys().isdisjoint({"block_size", "max_model_len"})


@pytest.mark.usefixtures("cores")
def test_a_step_has_room_for_every_sequence() -> None:
    told = spec({"engine": "fake", "max_num_seqs": 300, "max_num_batched_tokens": 64})
    assert told.engine_args["max_num_batched_tokens"] == 300


def model_dir(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.usefixtures("cores")
def test_a_cpu_workers_cache_holds_two_longest_requests_within_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 22}  # 16 GiB: 2 GiB for each of 2 workers
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    folder = model_dir(
        tmp_path, num_attention_heads=8, hidden_size=512, num_hidden_layers=4, num_key_value_heads=2
    )
    bytes_per_token = 2 * 2 * 4 * 2 * 64
    for max_model_len, num_bytes in (
        (16, 256 << 20),
        (1 << 17, 2 * (1 << 17) * bytes_per_token),
        (1 << 20, 2 << 30),
    ):
        config = load({"max_model_len": max_model_len})
        assert default_cpu_kv_bytes(config, folder) == num_bytes
    told = spec({"max_model_len": 1 << 17}, folder)
    assert told.engine_args["kv_cache_memory_bytes"] == 2 * (1 << 17) * bytes_per_token


@pytest.mark.usefixtures("cores")
def test_the_users_own_cache_size_counts(tmp_path: Path) -> None:
    told = spec({"kv_cache_memory_bytes": 12345}, model_dir(tmp_path))
    assert told.engine_args["kv_cache_memory_bytes"] == 12345
