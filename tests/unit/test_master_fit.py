"""Whether a model fits on GPUs and in memory that are only numbers, and what is said if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.gpu_box import GIB, gpu, gpus
from tests.unit.model_box import LLAMA_7B, SMALL
from tinfer.config import ServeConfig, load
from tinfer.errors import StartError
from tinfer.master.fit import CPU_KV_BYTES, Needs, gib, kv_bytes_on_cpu, kv_bytes_on_gpus
from tinfer.master.gpu_placement import on_gpus
from tinfer.master.gpus import Gpu
from tinfer.master.host_memory import HostMemory, host_memory
from tinfer.master.model_files import Weights
from tinfer.master.sizing import read_shape

WEIGHTS_7B = Weights({"F16": 14 * GIB})


def needs(config: ServeConfig, weights: Weights = WEIGHTS_7B, **more: Any) -> Needs:
    return Needs.of(config, read_shape({**LLAMA_7B, **more}), weights)


def room(values: dict[str, Any], on: list[Gpu], weights: Weights = WEIGHTS_7B) -> list[int]:
    config = load(values)
    layout = on_gpus(config, on, lambda _gpu: "float16")
    dtypes = ["float16"] * len(layout.groups)
    return kv_bytes_on_gpus(config, needs(config, weights), layout, on, dtypes)


def refusal(values: dict[str, Any], on: list[Gpu], weights: Weights = WEIGHTS_7B) -> str:
    with pytest.raises(StartError) as caught:
        room(values, on, weights)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_what_is_left_beside_the_weights_is_kv() -> None:
    one, other = room({}, gpus(2))
    assert one == other
    assert 56 * GIB < one < 57.5 * GIB  # 90 % of 80 GiB, less 14 of weights and over 1 of reserve


def test_a_user_who_says_how_much_kv_is_believed() -> None:
    assert room({"kv_cache_memory_bytes": 3 * GIB}, gpus(2)) == [3 * GIB] * 2


def test_workers_that_share_a_gpu_get_their_part() -> None:
    one, other = room({"prefill": 1, "decode": 1}, gpus(1))
    assert one == other
    assert 20 * GIB < one < 21.5 * GIB


def test_weights_over_one_gpu_name_the_size_that_fits() -> None:
    message = refusal({}, gpus(8, total_gib=24), Weights({"F16": 60 * GIB}))
    assert "the model does not fit: prefill-0 has 21.6 GiB (90% of GPU 0)" in message
    assert "60.0 GiB weights, 2.1 GiB KV for one request of 4096 tokens" in message
    assert message.endswith("--tensor-parallel-size 4 fits (of the 8 GPUs here)")


def test_it_names_no_size_that_there_are_no_gpus_for() -> None:
    message = refusal({}, gpus(2, total_gib=24), Weights({"F16": 60 * GIB}))
    assert message.endswith("no --tensor-parallel-size fits the 2 GPUs here")
    message = refusal({}, gpus(1, total_gib=24), Weights({"F16": 60 * GIB}))
    assert message.endswith("take larger GPUs or a smaller (quantized) model")


def test_a_size_that_is_still_too_small_is_not_named_again() -> None:
    values = {"tensor_parallel_size": 2}
    message = refusal(values, gpus(8, total_gib=24), Weights({"F16": 60 * GIB}))
    assert "30.0 GiB weights" in message
    assert "--tensor-parallel-size 4 fits" in message


def test_a_request_that_is_too_long_names_the_length_that_fits() -> None:
    message = refusal({"max_model_len": 16384}, gpus(2, total_gib=20))
    assert "14.0 GiB weights, 8.1 GiB KV for one request of 16384 tokens" in message
    assert "--tensor-parallel-size 2 fits" in message
    assert "--max-model-len 5120 fits" in message
    assert room({"max_model_len": 5120}, gpus(2, total_gib=20))


def test_too_small_a_kv_cache_is_the_users_own() -> None:
    message = refusal({"kv_cache_memory_bytes": GIB}, gpus(2))
    assert message.endswith("--kv-cache-memory-bytes allows 1.0 GiB")


def test_two_workers_on_one_gpu_that_holds_one() -> None:
    message = refusal({"prefill": 1, "decode": 1}, gpus(1, total_gib=24))
    assert "one worker alone on the GPU fits" in message


def test_the_smallest_gpu_of_a_group_counts() -> None:
    mixed = [gpu(0), gpu(1, total_gib=40), gpu(2), gpu(3)]
    small, large = room({"tensor_parallel_size": 2}, mixed)
    assert large - small == pytest.approx(36 * GIB, abs=16)


# --- main memory ----------------------------------------------------------------------------------


def on_cpu(values: dict[str, Any], memory: HostMemory, workers: int = 2, **model: Any) -> int:
    config = load(values)
    need = Needs.of(config, read_shape({**SMALL, **model}), Weights({"BF16": 1 << 20}))
    return kv_bytes_on_cpu(config, need, "bfloat16", workers, memory)


ROOMY = HostMemory(64 * GIB, 60 * GIB)


@pytest.mark.parametrize(
    ("max_model_len", "kv_bytes"),
    [(16, CPU_KV_BYTES), (1 << 17, 2 * ((1 << 17) + 128) * 4096), (1 << 20, 8 * GIB)],
)
def test_cpu_kv_holds_two_longest_requests_within_a_quarter(
    max_model_len: int, kv_bytes: int
) -> None:
    assert on_cpu({"max_model_len": max_model_len}, ROOMY) == kv_bytes


def test_the_users_own_cpu_cache_size_counts() -> None:
    assert on_cpu({"kv_cache_memory_bytes": 9 << 20}, ROOMY) == 9 << 20


def test_ranks_divide_a_cpu_workers_kv() -> None:
    assert on_cpu({"tensor_parallel_size": 2}, ROOMY) == CPU_KV_BYTES // 2


def test_a_cache_that_holds_no_longest_request() -> None:
    with pytest.raises(
        StartError, match=r"do not hold a request of 4194304.*--max-model-len 2096128 fits"
    ):
        on_cpu({"max_model_len": 1 << 22}, ROOMY)
    # 256 tokens in all, a block of which is the engine's own.
    with pytest.raises(StartError, match="--max-model-len 128 fits"):
        on_cpu({"kv_cache_memory_bytes": 1 << 20}, ROOMY)
    with pytest.raises(StartError, match="--max-model-len 240 fits"):
        on_cpu({"kv_cache_memory_bytes": 1 << 20, "block_size": 16}, ROOMY)
    assert on_cpu({"kv_cache_memory_bytes": 1 << 20, "max_model_len": 128}, ROOMY) == 1 << 20
    with pytest.raises(StartError, match=r"^1000 bytes of .*\): set --kv-cache-memory-bytes$"):
        on_cpu({"kv_cache_memory_bytes": 1000}, ROOMY)


def test_more_than_the_memory_that_is_free_names_both() -> None:
    tight = HostMemory(2 * GIB, GIB, "this control group")
    with pytest.raises(StartError) as caught:
        on_cpu({}, tight)
    assert "2 workers need 1.5 GiB" in caught.value.message
    assert "1.0 GiB of this control group are free" in caught.value.message
    assert on_cpu({}, tight, workers=1) == CPU_KV_BYTES


@pytest.mark.parametrize(("num", "text"), [(1 << 20, "1 MiB"), (3 * GIB // 2, "1.5 GiB")])
def test_bytes_for_a_reader(num: int, text: str) -> None:
    assert gib(num) == text


def cgroup(root: Path, line: str, group: str, **files: str) -> HostMemory:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(line + "\n")
    folder = root / "cg" / group
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return host_memory(root / "proc", root / "cg")


def test_a_control_group_is_tighter_than_the_machine(tmp_path: Path) -> None:
    found = cgroup(
        tmp_path,
        "0::/a/b",
        "a",
        memory__max="10000\n",
        memory__current="7000",
        memory__stat="anon 1\ninactive_file 2000\n",
    )
    assert found == HostMemory(10000, 5000, "this control group")


def test_a_control_group_of_the_first_version(tmp_path: Path) -> None:
    found = cgroup(
        tmp_path,
        "7:cpuset,memory:/a",
        "memory",
        memory__limit_in_bytes="9000",
        memory__usage_in_bytes="9500",
        memory__stat="",
    )
    assert found == HostMemory(9000, 0, "this control group")


@pytest.mark.parametrize("limit", ["max", str((1 << 63) - 4096)])
def test_no_limit_leaves_the_machine(tmp_path: Path, limit: str) -> None:
    found = cgroup(tmp_path, "0::/", "", memory__max=limit, memory__current="5")
    assert found.limited_by == "this machine"
    assert 0 < found.free_bytes <= found.total_bytes
