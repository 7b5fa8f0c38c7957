"""The compute-heavy model: the same bytes everywhere, whole or not at all, in nobody's way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import SafetensorError

from tinfer.bench import heavy_model
from tinfer.bench.heavy_model import (
    HEAD_SIZE,
    MANIFEST,
    NUM_KV_HEADS,
    ORDINARY_IDS,
    SIZES,
    WEIGHTS_FILE,
    HeavyModel,
    Shape,
    make,
    weights,
)
from tinfer.errors import StartError
from tinfer.tiny_model import files

SMALL = Shape(num_layers=2, hidden_size=256, intermediate_size=128)
MODEL = HeavyModel(size="small", shape=SMALL)


def values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "millions"), [("50m", 50), ("100m", 100), ("150m", 150)])
def test_every_size_is_as_its_name_says_and_fits_vllms_cpu_attention(
    name: str, millions: int
) -> None:
    shape = SIZES[name]
    assert shape.num_parameters / 1e6 == pytest.approx(millions, rel=0.06)
    assert shape.hidden_size == shape.num_heads * HEAD_SIZE
    assert shape.num_heads % NUM_KV_HEADS == 0 and shape.num_heads % 4 == 0
    assert shape.intermediate_size % 4 == 0 and files.VOCAB_SIZE % 2 == 0
    assert files.MAX_TOKENS >= 32768


def test_the_weights_are_pinned() -> None:
    digest = hashlib.sha256()
    for name, bits in weights(MODEL):
        digest.update(f"{name} {bits.shape} ".encode() + bits.astype("<u2").tobytes())
    assert digest.hexdigest() == (
        "5908a01af93a7c6db05971023f9e675b77a0c638bf2a62706bf1fbe5d4991f46"
    )


def test_another_seed_gives_other_weights() -> None:
    first = dict(weights(MODEL))
    second = dict(weights(HeavyModel(size="small", shape=SMALL, seed=1)))
    assert first.keys() == second.keys()
    same = [name for name, bits in first.items() if np.array_equal(bits, second[name])]
    assert same == [name for name in first if "norm" in name]


def test_weights_are_spread_evenly_around_zero() -> None:
    for name, bits in weights(MODEL):
        drawn = values(bits)
        if drawn.ndim == 1:
            assert (drawn == 1.0).all()
            continue
        std = {"model.embed_tokens.weight": 1.0}.get(name, heavy_model.LAYER_GAIN / 256**0.5)
        if name == "lm_head.weight":
            std = heavy_model.LOGIT_GAIN / 256**0.5
            drawn = drawn[list(ORDINARY_IDS)]
        if name.endswith("down_proj.weight"):
            std = heavy_model.LAYER_GAIN / 128**0.5
        assert drawn.std() == pytest.approx(std, rel=0.02), name
        assert abs(drawn.mean()) < 0.02 * std, name
        assert np.isin(-drawn, drawn).mean() > 0.99


def test_odd_tokens_hardly_ever_win() -> None:
    head = values(dict(weights(MODEL))["lm_head.weight"])
    odd = np.setdiff1d(np.arange(files.VOCAB_SIZE), ORDINARY_IDS)
    assert set(files.SPECIAL_IDS.values()) <= set(odd.tolist())
    assert head[odd].std() < 0.2 * head[list(ORDINARY_IDS)].std()


def test_the_files_are_those_of_a_llama(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    assert make(folder, MODEL)
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["hidden_size"]) == (["LlamaForCausalLM"], 256)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, NUM_KV_HEADS)
    assert (config["head_dim"], config["max_position_embeddings"]) == (HEAD_SIZE, 32768)
    written = tensors_of(folder / WEIGHTS_FILE)
    expected = dict(weights(MODEL))
    assert written.keys() == expected.keys()
    for name, bits in expected.items():
        assert written[name] == ("BF16", bits.shape, bits.tobytes()), name
    built_in = json.loads((files_of_the_built_in(tmp_path) / "tokenizer_config.json").read_text())
    own = json.loads((folder / "tokenizer_config.json").read_text())
    assert own == built_in
    assert (folder / WEIGHTS_FILE).stat().st_size < SMALL.weights_bytes + heavy_model.OTHER_BYTES
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert os.access(folder / WEIGHTS_FILE, os.R_OK)


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes, read by the format's description: numpy has no bfloat16."""
    content = path.read_bytes()
    data_at = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data_at])
    assert header.pop("__metadata__") == {"format": "pt"}
    data = content[data_at:]
    return {
        name: (one["dtype"], tuple(one["shape"]), data[slice(*one["data_offsets"])])
        for name, one in header.items()
    }


def files_of_the_built_in(tmp_path: Path) -> Path:
    files.write_files(tmp_path / "built-in")
    return tmp_path / "built-in"


def test_made_twice_it_is_the_same_and_left_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    second.mkdir()  # an empty folder is as good as none
    assert make(first, MODEL) and make(second, MODEL)
    assert contents(first) == contents(second)
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert not make(first, MODEL)
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == times


class Refused(NamedTuple):
    """How a folder comes to hold something else, and what is said of it."""

    name: str
    words: str


@pytest.mark.parametrize(
    "case",
    [
        Refused("foreign", "not empty, and holds no model"),
        Refused("other seed", "another model (small, seed 1,"),
        Refused("other version", "made by version 0"),
        Refused("edited", "has changed since it was made (config.json)"),
        Refused("incomplete", f"has changed since it was made ({WEIGHTS_FILE})"),
        Refused("garbled manifest", "not empty, and holds no model"),
        Refused("file", "is no directory"),
    ],
    ids=lambda case: case.name,
)
def test_what_stands_there_is_never_overwritten(tmp_path: Path, case: Refused) -> None:
    folder = tmp_path / "model"
    spoil(folder, case.name)
    before = contents(folder) if folder.is_dir() else folder.read_bytes()
    with pytest.raises(StartError) as raised:
        make(folder, MODEL)
    assert str(folder) in raised.value.message and case.words in raised.value.message
    assert (contents(folder) if folder.is_dir() else folder.read_bytes()) == before


def spoil(folder: Path, how: str) -> None:
    if how == "file":
        folder.write_text("mine")
        return
    if how == "foreign":
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        return
    make(folder, HeavyModel(size="small", shape=SMALL, seed=1 if how == "other seed" else 0))
    if how == "edited":
        (folder / "config.json").write_text("{}")
    elif how == "incomplete":
        (folder / WEIGHTS_FILE).unlink()
    elif how == "garbled manifest":
        (folder / MANIFEST).write_text("{")
    elif how == "other version":
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 0}))


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=SMALL.weights_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StartError, match=r"has \d+ MiB free, and the model takes \d+ MiB"):
        make(tmp_path / "model", MODEL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left"), KeyboardInterrupt()]
)
def test_a_write_that_ends_early_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(specs: Any, path: str, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(heavy_model, "serialize_file", fail)
    with pytest.raises((StartError, KeyboardInterrupt)):
        make(tmp_path / "model", MODEL)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def after_somebody_else(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", after_somebody_else)
    assert not make(tmp_path / "model", MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not make(tmp_path / "model", MODEL)
