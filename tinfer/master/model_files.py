"""A model's files as a placement needs them: which ones an engine loads, and their sizes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from msgspec import Struct

from tinfer.errors import StartError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
# A safetensors file starts with the length of its header; no real header is larger.
_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100 << 20
# What an engine or the tokenizer may open besides weights. `*.py` only where it may be run.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*", "LICENSE*")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


class Weights(Struct, frozen=True):
    """What the weights' files hold: bytes by the type of the tensors, safetensors' names ("BF16").

    Tensors in the types of `FLOATING` are loaded in the type the engine computes in, others
    (quantized ones) as they are. Files without a readable header count under the name "".
    """

    bytes_by_type: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes_by_type.values())


def read_config(directory: Path, shown: str) -> dict[str, Any]:
    """config.json. Raises `StartError` naming `shown` if there is none or it is no JSON object."""
    try:
        config = json.loads((directory / CONFIG_NAME).read_text())
    except FileNotFoundError as error:
        raise StartError(f"not a Hugging Face model, {CONFIG_NAME} is missing: {shown}") from error
    except (OSError, ValueError) as error:
        raise StartError(f"cannot read {CONFIG_NAME} of {shown}: {error}") from error
    if not isinstance(config, dict):
        raise StartError(f"{CONFIG_NAME} of {shown} is not a JSON object")
    return config


def weight_names(names: Iterable[str], index: dict[str, Any] | None) -> list[str]:
    """The files that hold the weights: those an index lists, else safetensors, else `.bin`.

    Only the top folder counts: others hold copies in other formats.
    """
    here = [name for name in names if "/" not in name]
    if index is not None:
        return sorted(set(index.get("weight_map", {}).values()))
    # "consolidated" files are the same weights in Mistral's own layout.
    safe = [n for n in here if n.endswith(".safetensors") and not n.startswith("consolidated")]
    plain = [n for n in here if fnmatch(n, "pytorch_model*.bin")]
    return sorted(safe or plain)


def engine_names(names: Iterable[str], weights: Iterable[str], with_code: bool) -> list[str]:
    """All files that a download needs: weights, configuration, tokenizer, and code if allowed."""
    patterns = (*_SMALL_FILES, *(("*.py",) if with_code else ()))
    small = [n for n in names if "/" not in n and any(fnmatch(n, p) for p in patterns)]
    return sorted({*small, *weights})


def read_index(directory: Path) -> dict[str, Any] | None:
    """The index of safetensors shards; None where there is none. Raises `StartError`."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StartError(f"cannot read {path}: {error}") from error
    return index if isinstance(index, dict) else None


def local_weights(directory: Path) -> Weights:
    """The weights in a folder, from the headers of its files.

    Raises `StartError` where files are missing, cut off or unreadable.
    """
    try:
        names = weight_names((entry.name for entry in directory.iterdir()), read_index(directory))
    except OSError as error:
        raise StartError(f"cannot read {directory}: {error}") from error
    if not names:
        raise StartError(f"no weights in {directory}: neither *.safetensors nor pytorch_model*.bin")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise StartError(f"incomplete model, {missing[0]}{more} missing: {directory}")
    totals: dict[str, int] = {}
    for name in names:
        try:
            sizes = tensor_bytes(directory / name)
        except (OSError, ValueError) as error:
            raise StartError(f"cannot read the weights {directory / name}: {error}") from error
        for kind, num_bytes in sizes.items():
            totals[kind] = totals.get(kind, 0) + num_bytes
    return Weights(totals)


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes by tensor type of one file. Raises `OSError`, or `ValueError` for a broken file."""
    file_bytes = path.stat().st_size
    if path.suffix != ".safetensors":
        return {"": file_bytes}
    with path.open("rb") as file:
        prefix = file.read(_HEADER_LENGTH.size)
        if len(prefix) < _HEADER_LENGTH.size:
            raise ValueError("it is cut off")
        (header_bytes,) = _HEADER_LENGTH.unpack(prefix)
        if header_bytes > min(_MAX_HEADER_BYTES, file_bytes):
            raise ValueError("it is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    totals: dict[str, int] = {}
    end = 0
    for tensor in header.values():
        first, last = tensor["data_offsets"]
        totals[tensor["dtype"]] = totals.get(tensor["dtype"], 0) + last - first
        end = max(end, last)
    if _HEADER_LENGTH.size + header_bytes + end > file_bytes:
        raise ValueError("it is cut off")
    return totals


def loaded_bytes(weights: Weights, item_bytes: int, file_item_bytes: int) -> int:
    """Bytes of the weights in memory, in a type of `item_bytes` per element.

    `file_item_bytes` is that of the files without a header, by config.json.
    """
    total = 0.0
    for kind, num_bytes in weights.bytes_by_type.items():
        if kind in FLOATING:
            total += num_bytes * item_bytes / ITEM_BYTES[kind]
        elif kind == "":
            total += num_bytes * item_bytes / file_item_bytes
        else:
            total += num_bytes
    return math.ceil(total)
