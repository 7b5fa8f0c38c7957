"""The tables of docs/config.md on the split: every row is an option that reaches the engines, and
what it says of it is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.gpu_box import gpus
from tests.unit.model_box import LLAMA_7B, SMALL
from tests.unit.test_cli import other_value
from tinfer.config import ServeConfig, load
from tinfer.core.types import Role
from tinfer.engine_args import refusal
from tinfer.errors import StartError
from tinfer.master.fit import Needs
from tinfer.master.gpu_placement import on_gpus
from tinfer.master.model_files import Weights
from tinfer.master.placement import Placement, worker_spec
from tinfer.master.sizing import read_shape, resolve_dtype
from tinfer.master.unsupported import check_environment, check_model
from tinfer.wire.control import WorkerSpec
from tinfer.worker.kv.errors import GeometryMismatch
from tinfer.worker.kv.format import block_dtype, kv_format
from tinfer.worker.kv.geometry import Geometry, Region, check_compatible

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "config.md").read_text()
GEOMETRY = Geometry(
    layout="LBHNC",
    dtype="torch.bfloat16",
    block_tokens=16,
    num_blocks=8,
    total_bytes=1 << 16,
    model_hash="m",
    tp_size=1,
    tp_rank=0,
    regions=(Region(0, 2, 4096, 512, 512, 0),),
)


def rows(name: str) -> dict[str, tuple[str, ...]]:
    """Of a table between markers: the cells by what stands first."""
    found = re.search(f"<!-- {name}: start -->\n(.*?)<!-- {name}: end -->", DOCUMENT, re.DOTALL)
    assert found is not None
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in found[1].strip().splitlines()[2:]]
    return {line[0].strip().strip("`"): tuple(cell.strip() for cell in line) for line in lines}


SPLIT = rows("split")
REFUSED = rows("refused")


def told(role: Role, **values: Any) -> WorkerSpec:
    """What a worker on a CPU is told; the placement is the one that the planner makes."""
    config = load(values)
    placement = Placement(
        worker_id=f"{role.value}-0",
        role=role,
        device="cpu",
        tensor_parallel_size=config.tensor_parallel_size,
        kv_bytes=config.kv_cache_memory_bytes,
    )
    return worker_spec(config, placement, 1, "/m", "/s", "/l", "shm")


def engine_part(spec: WorkerSpec) -> dict[str, Any]:
    return {**spec.engine_args, "tensor_parallel_size": spec.tensor_parallel_size}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_the_rows_are_the_options_that_reach_the_engines() -> None:
    before = engine_part(told(Role.PREFILL))
    reaching = {
        flag_of(name)
        for name in ServeConfig.__struct_fields__
        if engine_part(told(Role.PREFILL, **{name: other_value(name)})) != before
    }
    assert reaching == SPLIT.keys()


@pytest.mark.parametrize("flag", SPLIT)
def test_both_roles_are_told_the_same(flag: str) -> None:
    name = flag[2:].replace("-", "_")
    one, other = (told(role, **{name: other_value(name)}) for role in (Role.PREFILL, Role.DECODE))
    assert engine_part(one) == engine_part(other)


# --- what has to be equal ------------------------------------------------------------------------

# What each of these options makes of a worker's blocks.
DIFFERENT: dict[str, Geometry] = {
    "--dtype": msgspec.structs.replace(GEOMETRY, dtype="torch.float16"),
    "--quantization": msgspec.structs.replace(GEOMETRY, model_hash="n"),
    "--kv-cache-dtype": msgspec.structs.replace(GEOMETRY, dtype=block_dtype("torch.uint8", "fp8")),
    "--block-size": msgspec.structs.replace(GEOMETRY, block_tokens=32),
    "--tensor-parallel-size": msgspec.structs.replace(GEOMETRY, tp_size=2),
}


@pytest.mark.parametrize("flag", SPLIT)
def test_blocks_move_only_where_the_table_says(flag: str) -> None:
    assert SPLIT[flag][2] == ("yes" if flag in DIFFERENT else "no")
    theirs = DIFFERENT.get(flag)
    if theirs is None:
        return
    assert kv_format([theirs]) != kv_format([GEOMETRY])
    with pytest.raises(GeometryMismatch):
        check_compatible(GEOMETRY, theirs)


def test_eight_bit_floats_are_told_apart() -> None:
    kinds = [block_dtype("torch.uint8", kind) for kind in ("fp8_e4m3", "fp8_e5m2")]
    assert len(set(kinds)) == 2
    assert block_dtype("torch.bfloat16", "auto") == "torch.bfloat16"


# --- what each row says --------------------------------------------------------------------------


def needs(**values: Any) -> Needs:
    return Needs.of(load(values), read_shape(LLAMA_7B), Weights({"F16": 14 << 30}))


def dtype_follows_the_gpu() -> None:
    shape = read_shape(SMALL)
    assert resolve_dtype("auto", shape, (7, 5)) == "float16"
    assert resolve_dtype("auto", shape, (8, 0)) == "bfloat16"
    assert needs().kv_dtype("float16") == "float16"
    assert needs(kv_cache_dtype="bfloat16").kv_dtype("float16") == "bfloat16"


def smaller_weights_leave_more_room() -> None:
    plain = needs().weights_bytes("float16")
    small = needs(quantization="fp8").weights_bytes("float16")
    ends = 2 * 32000 * 4096 * 2
    assert small == ends + (plain - ends) // 2
    assert needs(quantization="awq").weights_bytes("float16") == plain
    shape = read_shape({**LLAMA_7B, "quantization_config": {}})
    found = Needs.of(load({"quantization": "fp8"}), shape, Weights({"I8": 7 << 30}))
    assert found.weights_bytes("float16") == 7 << 30
    assert told(Role.DECODE, quantization="fp8").engine_args["quantization"] == "fp8"
    assert "quantization" not in told(Role.DECODE).engine_args


def fp8_halves_kv() -> None:
    plain = needs().longest_kv_bytes("float16", 1)
    assert needs(kv_cache_dtype="fp8").longest_kv_bytes("float16", 1) * 2 == plain
    assert needs(kv_cache_dtype="fp8_e5m2").longest_kv_bytes("float16", 1) * 2 == plain
    assert told(Role.PREFILL, kv_cache_dtype="fp8").engine_args["kv_cache_dtype"] == "fp8"


def ranks_hold_their_heads() -> None:
    assert needs().longest_kv_bytes("float16", 4) * 4 == needs().longest_kv_bytes("float16", 1)


def the_least_length_counts() -> None:
    assert needs(max_model_len=100).longest_kv_bytes("float16", 1) < needs().longest_kv_bytes(
        "float16", 1
    )
    assert told(Role.PREFILL, max_model_len=100).engine_args["max_model_len"] == 100


def a_step_has_room_for_a_token_of_each() -> None:
    assert load({"max_num_seqs": 700}).step_tokens == 700
    assert told(Role.DECODE, max_num_seqs=700).engine_args["max_num_batched_tokens"] == 700


def the_chunk_is_the_step() -> None:
    assert told(Role.PREFILL, chunk_size="384").engine_args["max_num_batched_tokens"] == 384


def the_older_name_goes_before() -> None:
    config = load({"chunk_size": "384", "max_num_batched_tokens": 1024})
    assert config.chunk_tokens == 1024


def two_on_a_gpu_get_half_each() -> None:
    config = load({"prefill": 1, "decode": 1, "gpu_memory_utilization": 0.8})
    layout = on_gpus(config, gpus(1), lambda _gpu: "float16")
    assert [p.memory_share for p in layout.placements] == [0.4, 0.4]


def kv_is_of_each_rank() -> None:
    told_bytes = told(Role.DECODE, kv_cache_memory_bytes=1 << 20).engine_args
    assert told_bytes["kv_cache_memory_bytes"] == 1 << 20


def both_sides_reuse() -> None:
    off = told(Role.DECODE, enable_prefix_caching=False).engine_args
    assert (
        off["enable_prefix_caching"],
        told(Role.PREFILL).engine_args["enable_prefix_caching"],
    ) == (
        False,
        True,
    )


def reaches(name: str, value: Any) -> Callable[[], None]:
    def check() -> None:
        for role in (Role.PREFILL, Role.DECODE):
            assert told(role, **{name: value}).engine_args[name] == value

    return check


def any_argument_but_no_owned_one() -> None:
    told_args = told(Role.PREFILL, engine_arg={"max_logprobs": 5, "swap": [1]}).engine_args
    assert (told_args["max_logprobs"], told_args["swap"]) == (5, [1])
    assert load({"engine_arg": {"max_logprobs": 5}}).max_logprobs == 5


SAYS: dict[str, Callable[[], None]] = {
    "--dtype": dtype_follows_the_gpu,
    "--quantization": smaller_weights_leave_more_room,
    "--kv-cache-dtype": fp8_halves_kv,
    "--block-size": reaches("block_size", 32),
    "--tensor-parallel-size": ranks_hold_their_heads,
    "--max-model-len": the_least_length_counts,
    "--max-num-seqs": a_step_has_room_for_a_token_of_each,
    "--chunk-size": the_chunk_is_the_step,
    "--max-num-batched-tokens": the_older_name_goes_before,
    "--gpu-memory-utilization": two_on_a_gpu_get_half_each,
    "--kv-cache-memory-bytes": kv_is_of_each_rank,
    "--enable-prefix-caching": both_sides_reuse,
    "--enforce-eager": reaches("enforce_eager", True),
    "--trust-remote-code": reaches("trust_remote_code", True),
    "--reasoning-parser": reaches("reasoning_parser", "qwen3"),
    "--seed": reaches("seed", 4),
    "--engine-arg": any_argument_but_no_owned_one,
}


@pytest.mark.parametrize("flag", SPLIT)
def test_the_option_does_what_its_row_says(flag: str) -> None:
    SAYS[flag]()


# --- what is refused -----------------------------------------------------------------------------

ARGUMENTS = [
    (what, name)
    for what, cells in REFUSED.items()
    for name in re.findall(r"`([A-Za-z0-9_]+)`", cells[1])
]
# A value of each variable that is refused, and one that is not.
VARIABLES = {
    "PYTORCH_CUDA_ALLOC_CONF": ("expandable_segments:True", "max_split_size_mb:64"),
    "PYTORCH_ALLOC_CONF": (
        "max_split_size_mb:64, expandable_segments : true",
        "expandable_segments:False",
    ),
    "VLLM_USE_V2_MODEL_RUNNER": ("1", "0"),
}


@pytest.mark.parametrize(("what", "name"), ARGUMENTS)
def test_what_the_table_lists_is_refused(what: str, name: str) -> None:
    if name not in VARIABLES:
        assert refusal(name, {}, ()) is not None
        return
    bad, good = VARIABLES[name]
    check_environment({name: good})
    check_environment({name: ""})
    with pytest.raises(StartError, match=f"^{name} ") as caught:
        check_environment({name: bad})
    assert "\n" not in caught.value.message


def test_no_variable_is_left_out_of_the_table() -> None:
    assert VARIABLES.keys() <= {name for _, name in ARGUMENTS}


def test_a_model_that_speculates_by_itself_is_refused() -> None:
    check_model(SMALL)
    with pytest.raises(StartError, match="speculators_config"):
        check_model({**SMALL, "speculators_config": {"algorithm": "eagle"}})
