"""A model made on the spot that is heavy to compute, for measurements on boxes without a GPU.

The built-in model is so small that serving it costs more than computing it. This one has Llama's
architecture and 50 to 150 million random parameters, so that prefill and decode cost in the
proportion they have on real boxes: a prompt of 1K tokens takes as long as 10 to 50 decode steps.
What it says means nothing. Same name and seed, same weights, byte for byte, on every machine.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from safetensors import SafetensorError, TensorSpec, serialize_file

from tinfer.errors import StartError
from tinfer.tiny_model import files

HEAD_SIZE = 64
# Heads of keys and values: they split over 2 tensor-parallel ranks. With so few, the KV cache of 1K
# tokens is 2.5 % of the weights, which every decode step reads too: between OPT-13B, the paper's,
# with 3 % and Llama 3 8B with 0.8 %. With 4 and narrow layers it was 8 %, more than any of them.
NUM_KV_HEADS = 2
# Spread of a layer's outputs for inputs of spread 1. With it attention is sharp and every token
# depends on the whole prompt; at the usual 1 or less, greedy answers are one token over and over.
LAYER_GAIN = 2.3
EMBEDDING_STD = 1.0
# Spread of the logits, whose largest value an ordinary character then has, and the small one of
# the tokens that readable text does without: control characters, pieces of UTF-8, special tokens.
LOGIT_GAIN = 3.5
RARE_LOGIT_GAIN = 0.5
ORDINARY_IDS = (ord("\n"), *range(0x20, 0x7F))

MANIFEST = "heavy_model.json"
# Another number for weights or files that differ from what an earlier version of tinfer made.
MANIFEST_VERSION = 2
WEIGHTS_FILE = "model.safetensors"
# What the header of the weights and the other files take, rounded up.
OTHER_BYTES = 1 << 20
_ONE_BITS = 0x3F80  # 1.0 in bfloat16
# Of the odd numbers from -255 to 255, which a random byte is turned into.
_BYTE_STD = math.sqrt((256**2 - 1) / 3)

Bits = NDArray[np.uint16]


class Shape(Struct, frozen=True, kw_only=True):
    """The sizes of a Llama with heads of `HEAD_SIZE`, and `NUM_KV_HEADS` of keys and values."""

    num_layers: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_SIZE

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in _tensor_shapes(self).values())

    @property
    def weights_bytes(self) -> int:
        """In bfloat16."""
        return 2 * self.num_parameters


# Layers of one kind, so that the sizes differ in time but hardly in the proportion of the phases.
SIZES: Mapping[str, Shape] = MappingProxyType(
    {
        "50m": Shape(num_layers=5, hidden_size=1024, intermediate_size=2560),
        "100m": Shape(num_layers=10, hidden_size=1024, intermediate_size=2560),
        "150m": Shape(num_layers=15, hidden_size=1024, intermediate_size=2560),
    }
)
DEFAULT_SIZE = "50m"


class HeavyModel(Struct, frozen=True, kw_only=True):
    """Which model: the name and the shape of a size, and the seed (>= 0) of its weights."""

    size: str
    shape: Shape
    seed: int = 0


class _Manifest(Struct, forbid_unknown_fields=True):
    """What stands in `MANIFEST`: which model it is, and the SHA-256 of every other file."""

    version: int
    model: HeavyModel
    sha256: dict[str, str]


def make(folder: Path, model: HeavyModel) -> bool:
    """Write the model into `folder`, which appears whole or not at all.

    False if it is there already, unchanged. Raises `StartError` for a folder that holds anything
    else and for a full disk, `OSError` where it cannot be written.
    """
    folder = folder.resolve()
    if _is_made(folder, model):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(folder.parent, model)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        fresh = Path(beside) / "model"
        _write(fresh, model)
        try:
            # An empty folder gives way to it.
            os.rename(fresh, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Somebody else was faster.
            return not _is_made(folder, model)
    return True


def weights(model: HeavyModel) -> Iterator[tuple[str, Bits]]:
    """Every tensor by its Hugging Face name, as the bits of bfloat16, `[out, in]`.

    Each weight is one byte of PCG64's raw output, mapped to one of 256 values spread evenly around
    0. Raw output is what numpy promises to keep; its normal deviates may change with a version,
    and with a machine's logarithm.
    """
    source = np.random.PCG64(model.seed)
    for name, shape in _tensor_shapes(model.shape).items():
        if len(shape) == 1:
            yield name, np.full(shape, _ONE_BITS, np.dtype("<u2"))
            continue
        drawn = _random_bytes(source, math.prod(shape)).reshape(shape)
        if name == "model.embed_tokens.weight":
            yield name, _spread(EMBEDDING_STD)[drawn]
        elif name == "lm_head.weight":
            per_input = 1 / math.sqrt(model.shape.hidden_size)
            head = _spread(RARE_LOGIT_GAIN * per_input)[drawn]
            ordinary = list(ORDINARY_IDS)
            head[ordinary] = _spread(LOGIT_GAIN * per_input)[drawn[ordinary]]
            yield name, head
        else:
            yield name, _spread(LAYER_GAIN / math.sqrt(shape[1]))[drawn]


def _tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """By name, in the order in which they are drawn."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_size = NUM_KV_HEADS * HEAD_SIZE
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (files.VOCAB_SIZE, hidden)}
    for layer in range(shape.num_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": of for name, of in of_layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (files.VOCAB_SIZE, hidden)}


def _random_bytes(source: np.random.PCG64, num: int) -> NDArray[np.uint8]:
    words: NDArray[Any] = source.random_raw(-(-num // 8))
    return words.astype("<u8").view(np.uint8)[:num]


def _spread(std: float) -> Bits:
    """What each of the 256 bytes stands for: bfloat16 values of mean 0 and this deviation."""
    odd = 2 * np.arange(256) - 255
    bits = (odd * (std / _BYTE_STD)).astype(np.float32).view(np.uint32)
    # To the nearest bfloat16, ties to even.
    bias = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + bias) >> np.uint32(16)).astype(np.dtype("<u2"))


def _write(folder: Path, model: HeavyModel) -> None:
    files.write_files(folder)
    config = files.model_config() | {
        "hidden_size": model.shape.hidden_size,
        "intermediate_size": model.shape.intermediate_size,
        "num_hidden_layers": model.shape.num_layers,
        "num_attention_heads": model.shape.num_heads,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_weights(folder / WEIGHTS_FILE, model)
    manifest = _Manifest(MANIFEST_VERSION, model, _digests(folder))
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST).write_bytes(text + b"\n")


def _write_weights(path: Path, model: HeavyModel) -> None:
    # The specs hold bare addresses: `tensors` has to outlive the write.
    tensors = dict(weights(model))
    specs = {
        name: TensorSpec(
            dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for name, bits in tensors.items()
    }
    try:
        serialize_file(specs, str(path), {"format": "pt"})
    except SafetensorError as error:
        raise StartError(f"cannot write {path.name}: {error}") from error
    path.chmod(0o644)  # safetensors makes it private, and a server may run as another user


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and path.is_file():
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _is_made(folder: Path, model: HeavyModel) -> bool:
    """Whether exactly this model stands there. Raises `StartError` for anything else than it."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise StartError(f"{folder} is no directory")
    if not any(folder.iterdir()):
        return False
    found = _manifest_in(folder)
    if found is None:
        raise StartError(f"{folder} is not empty, and holds no model that this command made")
    if (found.version, found.model) != (MANIFEST_VERSION, model):
        raise StartError(
            f"{folder} holds another model ({found.model.size}, seed {found.model.seed}, made by "
            f"version {found.version} of this command): remove it, or take another directory"
        )
    present = _digests(folder)
    if changed := [name for name, sha in found.sha256.items() if present.get(name) != sha]:
        raise StartError(
            f"{folder} has changed since it was made ({', '.join(changed)}): remove it"
        )
    return True


def _manifest_in(folder: Path) -> _Manifest | None:
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _check_space(folder: Path, model: HeavyModel) -> None:
    needed, free = model.shape.weights_bytes + OTHER_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise StartError(
            f"{folder} has {free >> 20} MiB free, and the model takes {-(-needed >> 20)} MiB"
        )
