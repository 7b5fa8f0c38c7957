"""The compute-heavy model in real engines: vLLM serves and times it, transformers loads it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tinfer.bench.heavy_model import ORDINARY_IDS, SIZES, HeavyModel, make
from tinfer.bench.prefill_cost import NUM_REPEATS, OUTPUT_TOKENS, PROMPT_TOKENS
from tinfer.tiny_model import files


@pytest.fixture(scope="module")
def heavy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default size."""
    folder = tmp_path_factory.mktemp("heavy") / "model"
    make(folder, HeavyModel(size="50m", shape=SIZES["50m"]))
    return folder


@pytest.mark.full
@pytest.mark.timeout(600)
def test_made_measured_and_said(heavy_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ("--measure", "--json", str(path))
    done = subprocess.run(
        [sys.executable, "-m", "tinfer", "bench", "model", str(heavy_dir), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith(f"{heavy_dir} is up to date: 50m, seed 0, 51.7 M parameters")
    said = re.fullmatch(
        r"1K-token prefill (\d+\.\d) ms, decode step (\d+\.\d\d) ms: ratio (\d+\.\d)", last
    )
    assert said is not None, last
    measured = json.loads(path.read_text())["measured"]
    assert (measured["prompt_tokens"], measured["output_tokens"]) == (PROMPT_TOKENS, OUTPUT_TOKENS)
    assert len(measured["ttft_ms"]) == len(measured["itl_ms"]) == measured["num_repeats"]
    assert measured["num_repeats"] == NUM_REPEATS
    assert all(math.isfinite(value) and value > 0 for value in measured["ttft_ms"])
    assert said[3] == f"{measured['prefill_ms'] / measured['decode_step_ms']:.1f}"


def test_transformers_loads_it_and_it_does_not_stick_to_one_token(heavy_dir: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(heavy_dir, dtype=torch.float32)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(heavy_dir)
    assert model.num_parameters() == SIZES["50m"].num_parameters
    answers = set()
    for text in ("Count to 9.", "Count to 8.", "x" * 700):
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == [*files.encode_turn("user", text), files.SPECIAL_IDS["<|assistant|>"]]
        with torch.inference_mode():
            answer = model.generate(
                torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0
            )[0, len(ids) :]
            assert torch.isfinite(model(torch.tensor([ids])).logits).all()
        assert len(set(answer.tolist())) > 8
        answers.add(tuple(answer.tolist()))
        assert sum(token in ORDINARY_IDS for token in answer.tolist()) > 20
    assert len(answers) == 3
