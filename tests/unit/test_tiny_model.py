"""The tiny model's files: the same bytes every time, a tokenizer that keeps every byte."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from tinfer.tiny_model import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.ensure_tiny_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    make.make_tiny_model(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }


def test_made_once_even_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make.ensure_tiny_model, [tmp_path] * 4))
    inode = made[0].stat().st_ino
    assert set(made) == {made[0]} == set(tmp_path.iterdir())
    assert make.ensure_tiny_model(tmp_path).stat().st_ino == inode


def test_goes_to_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert make.ensure_tiny_model().parent == tmp_path / "tinfer"


def test_shapes_follow_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert dtypes == {"BF16"}
    assert len(shapes) == 3 + 9 * config["num_hidden_layers"]
    assert shapes["lm_head.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == [kv_size, config["hidden_size"]]
    assert config["vocab_size"] % 8 == 0


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_bfloat16_is_the_nearest(value: float) -> None:
    exact = np.array([value], np.float32)
    bits = make.to_bfloat16(exact)

    def widen(half: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> float:
        return float((half.astype(np.uint32) << 16).view(np.float32)[0])

    error = abs(widen(bits) - value)
    for neighbour in (bits - np.uint16(1), bits + np.uint16(1)):
        assert not error > abs(widen(neighbour) - value)


@given(text=st.text())
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_token_is_its_byte(tokenizer: Tokenizer) -> None:
    for text in ("a", "é€😀", "\x00\n\x7f"):
        assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"


def test_special_tokens_are_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|user|>a<|end|>").ids
    assert ids == [tokenizer.token_to_id("<|user|>"), ord("a"), tokenizer.token_to_id("<|end|>")]
    assert tokenizer.get_vocab_size() == make.VOCAB_SIZE


def test_text_bytes_are_likelier_than_the_others(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start, end = header["lm_head.weight"]["data_offsets"]
    base = 8 + int.from_bytes(raw[:8], "little")
    bits = np.frombuffer(raw[base + start : base + end], np.uint16).astype(np.uint32) << 16
    head = bits.view(np.float32).reshape(config["vocab_size"], config["hidden_size"])
    assert 0.25 < head[ord("a")].std() < 0.35
    assert head[[0, 0xFF, config["eos_token_id"]]].std() < 0.1


def test_chat_template_without_torch(folder: Path) -> None:
    script = """
import sys
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
messages = [{"role": "system", "content": "be"}, {"role": "user", "content": parts}]
print(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
print(tokenizer.eos_token_id, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    prompt, facts = done.stdout.splitlines()
    assert prompt == "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    assert facts == "256 False"
