"""A small Llama with large random weights and the built-in model's tokenizer, for equality tests.

The trained model gives many prompts the same answer, and a model with the usual small
initialisation gives all of them one constant token: a server that loses, repeats or mixes up KV
blocks could pass with either. So the weights here are large (embedding std 1.0, head std 0.3,
layers std 0.2): every token depends on the whole prompt. Bytes that cannot stand in UTF-8 text,
control characters and special tokens get small rows in the output head: greedy output then reads
as characters, some of several bytes, and rarely ends by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file

from tinfer.tiny_model import files

SEED = 20
NUM_LAYERS = 4
HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 256
NUM_HEADS = 4
NUM_KV_HEADS = 2
EMBEDDING_STD = 1.0
HEAD_STD = 0.3
WEIGHT_STD = 0.2
# Rows of tokens that text should hardly ever contain; 0.05 keeps them possible when sampling.
RARE_HEAD_STD = 0.05

# For comparisons of answers. In bfloat16 those of plain vLLM depend on how prompts are cut into
# chunks: on two cores with AVX2 and without AVX-512, 3 of 120 prompts had two tokens equally likely
# in one cut and not in the other; in float32 none.
EXACT = ("--dtype", "float32")

Weights = dict[str, NDArray[np.float32]]


def make_random_model(folder: Path) -> None:
    """Write config, weights (bfloat16) and tokenizer into `folder`, creating it."""
    files.write_files(folder)
    config = files.model_config() | {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    # The specs hold bare addresses: `rounded` has to outlive the write.
    rounded = {name: _to_bfloat16(values) for name, values in _weights().items()}
    specs = {
        name: TensorSpec(
            dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for name, bits in rounded.items()
    }
    serialize_file(specs, str(folder / "model.safetensors"), {"format": "pt"})


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as its 16 bits; no NaN or infinity."""
    bits = values.view(np.uint32)
    bias = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + bias) >> np.uint32(16)).astype(np.uint16)


def _weights() -> Weights:
    """Return every tensor by its Hugging Face name, `[out, in]` as in torch.nn.Linear."""
    # RandomState: numpy promises that its streams never change, for Generator it does not.
    random = np.random.RandomState(SEED)

    def normal(std: float, *shape: int) -> NDArray[np.float32]:
        return (random.standard_normal(shape) * std).astype(np.float32)

    hidden, inner = HIDDEN_SIZE, INTERMEDIATE_SIZE
    ones = np.ones(hidden, np.float32)
    query_size, kv_size = NUM_HEADS * files.HEAD_DIM, NUM_KV_HEADS * files.HEAD_DIM
    embedding = normal(EMBEDDING_STD, files.VOCAB_SIZE, hidden)
    weights: Weights = {"model.embed_tokens.weight": embedding}
    for layer in range(NUM_LAYERS):
        for name, shape in (
            ("self_attn.q_proj", (query_size, hidden)),
            ("self_attn.k_proj", (kv_size, hidden)),
            ("self_attn.v_proj", (kv_size, hidden)),
            ("self_attn.o_proj", (hidden, query_size)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            weights[f"model.layers.{layer}.{name}.weight"] = normal(WEIGHT_STD, *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = ones
    weights["model.norm.weight"] = ones
    head = normal(HEAD_STD, files.VOCAB_SIZE, hidden)
    head[_rare_ids()] *= RARE_HEAD_STD / HEAD_STD
    weights["lm_head.weight"] = head
    return weights


def _rare_ids() -> list[int]:
    """Token ids that readable text does without: control bytes, bytes never in UTF-8, specials."""
    control = [byte for byte in range(0x20) if byte != ord("\n")] + [0x7F]
    # Also left out: leads of three and four bytes, which random continuations rarely complete.
    never = [0xC0, 0xC1, *range(0xE0, 0x100)]
    return control + never + list(range(files.NUM_BYTES, files.VOCAB_SIZE))
