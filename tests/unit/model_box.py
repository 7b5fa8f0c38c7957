"""Models that are only files: a config.json and safetensors whose headers are real."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

# The figures of a 7B model: 32 layers of 32 heads of 128.
LLAMA_7B: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
SMALL: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


def header(tensors: dict[str, tuple[str, int]]) -> bytes:
    """A safetensors header for tensors of (type, bytes)."""
    entries, end = {}, 0
    for name, (kind, num_bytes) in tensors.items():
        offsets = [end, end + num_bytes]
        entries[name] = {"dtype": kind, "shape": [num_bytes], "data_offsets": offsets}
        end += num_bytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return struct.pack("<Q", len(text)) + text


def write_weights(path: Path, **tensors: tuple[str, int]) -> None:
    """A safetensors file whose data is a hole."""
    data = header(tensors)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + sum(num_bytes for _, num_bytes in tensors.values()))


def write_model(folder: Path, config: dict[str, Any], weights_bytes: int = 1 << 20) -> Path:
    """A model directory with half-precision weights of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", w=("BF16", weights_bytes))
    return folder
