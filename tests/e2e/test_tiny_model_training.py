"""The training script: the same batches each time, and a run cut off goes on as if it was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.optim import _muon

from tinfer.tiny_model import attention, files, precision, tasks, train

# As torch has it, before a trainer puts its own in its place.
BFLOAT16_ONE: Any = _muon._zeropower_via_newtonschulz


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 1200)
    monkeypatch.setattr(train, "SAVE_EVERY_STEPS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_batches_follow_from_the_step(small: None) -> None:
    assert train.batch_of(5) == train.batch_of(5)
    assert train.batch_of(5) != train.batch_of(6)
    pool = train.batches(0)
    assert len(pool) == train.STEPS_PER_POOL and all(pool)


def test_answers_alone_have_a_loss() -> None:
    for ids, labels in (one for step in range(2) for one in train.batch_of(step)):
        assert len(ids) == len(labels) <= train.MAX_CONVERSATION_TOKENS
        end, assistant = files.SPECIAL_IDS[files.END], files.SPECIAL_IDS["<|assistant|>"]
        inside = False
        for token, label in zip(ids, labels, strict=True):
            assert label == (token if inside else train.IGNORED)
            inside = token == assistant or (inside and token != end)


def test_training_never_sees_a_held_out_prompt() -> None:
    texts = {e.prompt for t in ("repeat", "count", "spell") for e in tasks.held_out_examples(t, 50)}
    start, end = files.SPECIAL_IDS["<|user|>"], files.SPECIAL_IDS[files.END]
    for ids, _ in (one for step in range(4) for one in train.batch_of(step)):
        for position, token in enumerate(ids):
            if token == start:
                prompt = bytes(ids[position + 1 : ids.index(end, position)]).decode()
                assert prompt not in texts


def test_a_run_that_was_cut_off_goes_on_as_if_not(small: None, tmp_path: Path) -> None:
    train.train(tmp_path / "whole", tmp_path / "whole-model", num_steps=4)
    trainer = train.Trainer(4)
    for _, batch in list(train.steps(trainer))[:2]:
        trainer.train_step(batch)
    (tmp_path / "cut").mkdir()
    trainer.save(tmp_path / "cut" / "checkpoint.safetensors")
    del trainer
    train.train(tmp_path / "cut", tmp_path / "cut-model", num_steps=4)
    whole, cut = (
        load_file(tmp_path / f"{n}-model" / "model.safetensors") for n in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert train.checkpoint_step(tmp_path / "cut" / "checkpoint.safetensors") == 4


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 300])
def test_its_attention_is_attention(num_tokens: int) -> None:
    """The same values and gradients as torch's, with query heads that share a KV head, over one
    block of queries, a full one, and several."""
    generator = torch.Generator().manual_seed(num_tokens)
    inputs = query, key, value = [
        torch.randn(2, heads, num_tokens, 32, generator=generator, requires_grad=True)
        for heads in (8, 4, 4)
    ]
    ours = attention.causal_attention(query, key, value, scaling=32**-0.5)
    theirs = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(theirs.shape, generator=generator)
    found, expected = (torch.autograd.grad((one * weights).sum(), inputs) for one in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_trained_with_it(small: None) -> None:
    trainer = train.Trainer(1)
    assert trainer.model.config._attn_implementation == attention.NAME
    prompt = torch.tensor([[5, 9, 200, 31, 7]])
    ours = trainer.model(input_ids=prompt).logits
    trainer.model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(ours, trainer.model(input_ids=prompt).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (32, 32)])
def test_matrices_are_made_orthogonal_in_float32_too(shape: tuple[int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    coefficients = (3.4445, -4.775, 2.0315)  # torch.optim.Muon's default
    found = precision.orthogonalized(update, coefficients, 5, 1e-7)
    wanted = BFLOAT16_ONE(update, coefficients, 5, 1e-7).float()
    assert functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999
    assert found.shape == update.shape
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.5
