"""The training script: the same batches each time, and a run cut off goes on as if it was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinfer.tiny_model import files, tasks, train


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 1200)
    monkeypatch.setattr(train, "SAVE_EVERY_STEPS", 3)
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
    train.train(tmp_path / "whole", tmp_path / "whole-model", num_steps=6)
    trainer = train.Trainer(6)
    for _, batch in list(train.steps(trainer))[:3]:
        trainer.train_step(batch)
    (tmp_path / "cut").mkdir()
    trainer.save(tmp_path / "cut" / "checkpoint.safetensors")
    del trainer
    train.train(tmp_path / "cut", tmp_path / "cut-model", num_steps=6)
    whole, cut = (
        load_file(tmp_path / f"{n}-model" / "model.safetensors") for n in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert train.checkpoint_step(tmp_path / "cut" / "checkpoint.safetensors") == 6
