"""The servers of each arm: what is equal, what is not, and which devices they get."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tinfer.bench.compare.arms import (
    KINDS,
    SERVED_NAME,
    Arm,
    Kind,
    ServerPlan,
    default_arms,
    inherited,
    parse_arms,
    servers_of,
)
from tinfer.bench.compare.options import CompareOptions, with_devices
from tinfer.errors import StartError

CPU = CompareOptions(
    model="/model",
    cores=(2, 3, 4, 5),
    threads=2,
    kv_cache_memory_bytes=1000,
    dtype="bfloat16",
    block_size=32,
    max_model_len=2048,
    max_num_seqs=64,
)
GPU = replace(CPU, device="cuda", num_workers=4, cores=(), gpus=("0", "2", "5", "GPU-x"))


def plans(kind: Kind, options: CompareOptions) -> tuple[ServerPlan, ...]:
    return servers_of(Arm(kind, kind), options)


def value_of(plan: ServerPlan, flag: str) -> str:
    return plan.argv[plan.argv.index(flag) + 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_is_equal_in_all_arms(kind: Kind, options: CompareOptions) -> None:
    for plan in plans(kind, options):
        assert plan.argv[plan.argv.index("serve") + 1] == "/model"
        assert value_of(plan, "--served-model-name") == SERVED_NAME
        assert value_of(plan, "--dtype") == "bfloat16"
        assert value_of(plan, "--block-size") == "32"
        assert value_of(plan, "--max-model-len") == "2048"
        assert value_of(plan, "--max-num-seqs") == ("16" if kind == "paper" else "64")
        assert "--enable-prefix-caching" in plan.argv
        assert "--port" not in plan.argv
        # Both take sampling defaults from the model, as tinfer always does.
        assert "--generation-config" not in plan.argv


@pytest.mark.parametrize("kind", KINDS)
def test_no_arm_alone_has_cuda_graphs(kind: Kind) -> None:
    for options, is_eager in ((GPU, False), (replace(GPU, enforce_eager=True), True), (CPU, True)):
        for plan in plans(kind, options):
            assert ("--enforce-eager" in plan.argv) == is_eager


def test_on_gpus_every_engine_may_use_all_cores() -> None:
    cores = (0, 1, 2, 3, 4, 5, 6, 7)
    for kind in KINDS:
        for plan in plans(kind, replace(GPU, cores=cores)):
            assert plan.engine_cores == cores


@pytest.mark.parametrize("options", [CPU, GPU], ids=["cpu", "gpu"])
def test_all_devices_are_used_once_and_have_equal_kv(options: CompareOptions) -> None:
    for kind in KINDS:
        servers = plans(kind, options)
        devices = [device for plan in servers for device in plan.devices]
        assert devices == list(range(options.num_workers)), kind
        for plan in servers:
            # On GPUs, and for tinfer's workers, the figure is for each rank or worker.
            shares = 2 if kind == "paper" and options.device == "cpu" else 1
            assert value_of(plan, "--kv-cache-memory-bytes") == str(1000 * shares)


def test_cpu_replicas_have_cores_of_their_own_and_share_them_for_their_front_ends() -> None:
    one, two = plans("replicas", CPU)
    assert (one.engine_cores, two.engine_cores) == ((2, 3), (4, 5))
    for plan in (one, two):
        assert plan.front_cores == (2, 3, 4, 5)
        assert plan.environment["OMP_NUM_THREADS"] == "2"
        assert plan.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert "--enforce-eager" in plan.argv and "--max-num-batched-tokens" not in plan.argv
    (paper,) = plans("paper", CPU)
    assert paper.engine_cores == (2, 3, 4, 5) and paper.environment["OMP_NUM_THREADS"] == "4"
    assert "--no-enable-chunked-prefill" in paper.argv
    assert "--tensor-parallel-size" not in paper.argv
    (ours,) = plans("tinfer-split", CPU)
    assert ours.engine_cores == (2, 3, 4, 5) and value_of(ours, "--cpu-threads") == "2"
    assert (value_of(ours, "--prefill"), value_of(ours, "--decode")) == ("1", "1")


def test_gpu_replicas_see_one_gpu_each() -> None:
    seen = [plan.environment["CUDA_VISIBLE_DEVICES"] for plan in plans("replicas-512", GPU)]
    assert seen == ["0", "2", "5", "GPU-x"]
    for plan in plans("replicas-512", GPU):
        assert value_of(plan, "--max-num-batched-tokens") == "512"
        assert "OMP_NUM_THREADS" not in plan.environment and plan.engine_cores is None
        assert "--enforce-eager" not in plan.argv
    (paper,) = plans("paper", GPU)
    assert value_of(paper, "--tensor-parallel-size") == "4"
    assert paper.environment["CUDA_VISIBLE_DEVICES"] == "0,2,5,GPU-x"
    (ours,) = plans("tinfer-auto", GPU)
    assert ours.environment["CUDA_VISIBLE_DEVICES"] == "0,2,5,GPU-x"
    assert "--cpu-threads" not in ours.argv
    assert (value_of(ours, "--prefill"), value_of(ours, "--decode")) == ("2", "2")


def test_settings_reach_every_server() -> None:
    options = replace(
        CPU,
        enable_prefix_caching=False,
        block_size=None,
        max_model_len=None,
        tinfer_args=("--log-dir", "/logs"),
        vllm_args=("--seed", "3"),
        vllm_command=("other-vllm",),
    )
    for kind in KINDS:
        for plan in plans(kind, options):
            assert "--no-enable-prefix-caching" in plan.argv
            assert "--block-size" not in plan.argv and "--max-model-len" not in plan.argv
            last = ("--log-dir", "/logs") if kind.startswith("tinfer") else ("--seed", "3")
            assert plan.argv[-2:] == last
            assert kind.startswith("tinfer") or plan.argv[0] == "other-vllm"


def test_nothing_unequal_is_inherited() -> None:
    unequal = {"OMP_NUM_THREADS": "8", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_API_KEY": "k"}
    options = {"TINFER_MAX_NUM_SEQS": "8", "TINFER_ROUTE": "whole", "TINFER_CONFIG": "/x.toml"}
    kept = inherited({"PATH": "/bin", "TINFER_PYTHON": "python3", **unequal, **options})
    assert kept == {"PATH": "/bin", "TINFER_PYTHON": "python3"}


def test_arms_by_name() -> None:
    assert parse_arms("tinfer-auto, replicas=a,replicas=b") == (
        Arm("tinfer-auto", "tinfer-auto"),
        Arm("a", "replicas"),
        Arm("b", "replicas"),
    )
    assert [arm.kind for arm in default_arms()] == list(KINDS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("replica", "none of tinfer-auto"),
        ("replicas,replicas", "two arms are called replicas"),
        ("tinfer-auto", "need a plain replica"),
        ("", "need a plain replica"),
    ],
)
def test_arms_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_arms(text)


def test_devices_by_default() -> None:
    assert with_devices(CompareOptions(), [4, 1, 9]).cores == (1, 4)
    assert with_devices(CompareOptions(cores=(7, 3)), [1, 3, 7]).cores == (7, 3)
    cuda: dict[str, Any] = {"device": "cuda", "num_workers": 3}
    assert with_devices(CompareOptions(**cuda), []).gpus == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_workers": 1}, "at least two"),
        ({"num_workers": 2, "threads": 2}, "4 cores"),
        ({"device": "cuda", "gpus": ("0",)}, "as many GPUs, not 1"),
        # The system would bind an engine to the one that there is, or to none.
        ({"cores": (0, 9)}, "core 9 is not one of 0, 1"),
        ({"device": "cuda", "cores": (9,)}, "core 9 is not one of 0, 1"),
    ],
)
def test_too_few_devices(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StartError, match=words):
        with_devices(CompareOptions(**changes), [0, 1])
