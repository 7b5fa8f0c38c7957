"""The built-in model: small files, a shape that every device takes, and no byte lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from tinfer.tiny_model import MODEL_DIR, files

MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= MAX_BYTES


def test_the_files_are_those_of_the_code(tmp_path: Path) -> None:
    files.write_files(tmp_path)
    for path in tmp_path.iterdir():
        assert (MODEL_DIR / path.name).read_text() == path.read_text()
    expected = {path.name for path in tmp_path.iterdir()} | {"model.safetensors", "README.md"}
    assert {path.name for path in MODEL_DIR.iterdir()} == expected


def test_shapes_follow_the_config() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    with safe_open(MODEL_DIR / "model.safetensors", framework="numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert dtypes == {"BF16"}
    assert len(shapes) == 3 + 9 * config["num_hidden_layers"]
    assert shapes["lm_head.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == [kv_size, config["hidden_size"]]


def test_every_device_takes_the_shape() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["head_dim"] in (32, 64)  # vLLM's attention on a CPU takes few others
    assert config["num_key_value_heads"] >= 2
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert config[name] % 2 == 0, "two tensor-parallel ranks share it"
    assert config["max_position_embeddings"] >= 32768


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
    assert tokenizer.get_vocab_size() == files.VOCAB_SIZE


def test_chat_template_without_torch() -> None:
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
        [sys.executable, "-c", script, str(MODEL_DIR)], capture_output=True, text=True, check=True
    )
    prompt, facts = done.stdout.splitlines()
    assert prompt == "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    assert facts == "256 False"
