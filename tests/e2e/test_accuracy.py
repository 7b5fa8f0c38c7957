"""The built-in model answers held-out questions, and the split changes none of its answers.

Its answers follow from the prompt (repeat this, what is the code of that), so a KV block that is
lost, late or someone else's shows as a wrong answer here, not only as a different one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.accuracy import OPEN_TASKS, accuracy, questions, through_plain_engine, through_server
from tests.e2e.conftest import QUICK
from tests.e2e.serving import ServeProcess, until_idle
from tinfer.tiny_model import MODEL_DIR

NUM_PER_TASK = 20
# Of 20 each; benchmarks/results/tiny_model_accuracy_cpu.json has the shares of hundreds.
LEAST = {"count": 0.9, "repeat": 0.9, "spell": 0.9}


async def test_the_split_changes_no_answer(server: ServeProcess) -> None:
    examples = questions(NUM_PER_TASK)
    assert {example.task for example in examples} == set(OPEN_TASKS)
    dtype = QUICK[1] if QUICK else "auto"
    plain = await asyncio.to_thread(through_plain_engine, str(MODEL_DIR), examples, dtype)
    split = await through_server(server.url, "tiny", examples)
    differing = [(e.prompt, p, s) for e, p, s in zip(examples, plain, split, strict=True) if p != s]
    assert not differing, differing[:3]
    shares = accuracy(examples, split)
    assert all(shares[task] >= least for task, least in LEAST.items()), shares
    await until_idle(server.url)


def test_transformers_loads_it_too() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    chat = [{"role": "user", "content": "Spell planet."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "p-l-a-n-e-t"
