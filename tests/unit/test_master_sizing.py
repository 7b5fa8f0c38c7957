"""What a model needs, by its config.json: KV per token, data type, longest request, and splits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.model_box import LLAMA_7B, SMALL
from tinfer.errors import StartError
from tinfer.master.sizing import (
    GPU_RESERVE_BYTES,
    check_splits,
    gpu_reserve_bytes,
    kv_bytes_per_token,
    kv_bytes_per_token_and_rank,
    read_shape,
    resolve_dtype,
    splits,
)


def test_the_shape_of_a_llama() -> None:
    shape = read_shape(LLAMA_7B)
    assert (shape.num_heads, shape.num_kv_heads, shape.vocab_size) == (32, 32, 32000)
    assert (shape.dtype, shape.max_tokens, shape.is_quantized) == ("float16", 4096, False)
    # The well-known half a mebibyte per token.
    assert kv_bytes_per_token(shape, "float16") == 512 << 10
    assert kv_bytes_per_token(shape, "float32") == 1 << 20
    assert kv_bytes_per_token_and_rank(shape, "float16", 4) == 128 << 10


@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        (SMALL, 2 * 2 * 4 * 4 * 64),
        ({**SMALL, "head_dim": 32}, 2 * 2 * 4 * 4 * 32),
        ({"text_config": SMALL, "vision_config": {}}, 2 * 2 * 4 * 4 * 64),
        ({"n_head": 12, "n_embd": 768, "n_layer": 12}, 2 * 2 * 12 * 768),
        ({**SMALL, "multi_query": True}, 2 * 2 * 4 * 64),
        ({**SMALL, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 2 * 4 * 576),
        ({"model_type": "odd"}, 0),
    ],
)
def test_kv_of_other_models(config: dict[str, Any], per_token: int) -> None:
    assert kv_bytes_per_token(read_shape(config), "bfloat16") == per_token


def test_latent_kv_is_on_every_rank() -> None:
    shape = read_shape({**SMALL, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert kv_bytes_per_token_and_rank(shape, "bfloat16", 4) == 2 * 4 * 576
    assert splits(shape, 8) == ""


@pytest.mark.parametrize(
    ("more", "longest"),
    [
        ({}, 2048),
        ({"max_seq_len": 1024}, 1024),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 4096),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "model_type": "gemma3_text"}, 2048),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 2048),
        ({"max_position_embeddings": None}, 2048),
    ],
)
def test_the_longest_request_is_what_vllm_makes_of_it(more: dict[str, Any], longest: int) -> None:
    assert read_shape({**SMALL, **more}).max_tokens == longest


@pytest.mark.parametrize(
    ("requested", "in_files", "capability", "resolved"),
    [
        ("auto", "bfloat16", None, "bfloat16"),
        ("auto", "bfloat16", (8, 0), "bfloat16"),
        ("auto", "bfloat16", (7, 5), "float16"),
        ("auto", "float16", (9, 0), "float16"),
        ("auto", "float32", (9, 0), "bfloat16"),
        ("auto", "float32", (7, 0), "float16"),
        ("half", "bfloat16", (9, 0), "float16"),
        ("float", "bfloat16", None, "float32"),
        ("bfloat16", "float16", (7, 5), "bfloat16"),
    ],
)
def test_the_data_type_an_engine_computes_in(
    requested: str, in_files: str, capability: tuple[int, int] | None, resolved: str
) -> None:
    shape = read_shape({**SMALL, "dtype": in_files})
    assert resolve_dtype(requested, shape, capability) == resolved


def test_the_reserve_grows_with_the_step_and_the_vocabulary() -> None:
    shape = read_shape(LLAMA_7B)
    least = gpu_reserve_bytes(shape, "float16", 1, 512, 256)
    assert GPU_RESERVE_BYTES < least < 2 * GPU_RESERVE_BYTES
    assert gpu_reserve_bytes(shape, "float16", 1, 8192, 256) > least
    assert gpu_reserve_bytes(shape, "float16", 1, 512, 1024) > least
    assert gpu_reserve_bytes(shape, "float16", 2, 512, 256) < least


@pytest.mark.parametrize(
    ("more", "size", "words"),
    [
        ({}, 3, "the model has 8 attention heads; possible: 1, 2, 4"),
        ({}, 8, "the model has 4 key-value heads; possible: 1, 2, 4"),
        ({"num_attention_heads": 9, "num_key_value_heads": 9}, 9, "512 vocabulary entries"),
    ],
)
def test_a_size_that_does_not_divide_the_model(more: dict[str, Any], size: int, words: str) -> None:
    with pytest.raises(StartError) as caught:
        check_splits(read_shape({**SMALL, **more}), size)
    assert caught.value.message.startswith(f"--tensor-parallel-size {size}: ")
    assert words in caught.value.message


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_size_that_does(size: int) -> None:
    check_splits(read_shape({**SMALL, "vocab_size": 32001}), size)  # vLLM pads the vocabulary
