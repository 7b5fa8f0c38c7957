"""The tasks of the built-in model: seeded, held out by the prompt alone, answers that check."""

from __future__ import annotations

import random
import re

import pytest

from tinfer.tiny_model import files, tasks

OPEN_TASKS = sorted(set(tasks.TASKS) - {"small_talk"})


def test_same_seed_same_examples() -> None:
    drawn = [[tasks.draw(random.Random(5)) for _ in range(3)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert tasks.draw(random.Random(6)) != tasks.draw(random.Random(5))


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_held_out_prompts_are_never_trained_on(task: str) -> None:
    held_out = tasks.held_out_examples(task, 20)
    assert len({example.prompt for example in held_out}) == 20
    assert held_out == tasks.held_out_examples(task, 20)
    rng = random.Random(1)
    for _ in range(200):
        assert not tasks.is_held_out(tasks.draw(rng, task).prompt)
    assert all(tasks.is_held_out(example.prompt) for example in held_out)


def test_small_talk_has_no_held_out_prompts() -> None:
    with pytest.raises(ValueError, match="small_talk"):
        tasks.held_out_examples("small_talk", 1)


def test_a_task_with_few_prompts_gives_those_it_has() -> None:
    few = tasks.held_out_examples("list", 600)
    assert 20 < len(few) < 500
    assert len({example.prompt for example in few}) == len(few)


def test_counts_are_what_was_asked() -> None:
    assert tasks.count_answer(8, 11) == "8 9 10 11"
    assert tasks.count_answer(2, 0) == "2 1 0"
    for example in tasks.held_out_examples("count", 60):
        numbers = [int(n) for n in re.findall(r"\d+", example.prompt)]
        first, last = numbers if len(numbers) == 2 else (1, *numbers)
        assert example.answer == tasks.count_answer(first, last)


def test_answers_follow_from_prompts() -> None:
    for example in tasks.held_out_examples("repeat", 60):
        assert example.prompt.split(": ", 1)[1] == example.answer
    for example in tasks.held_out_examples("spell", 60):
        assert example.answer.replace("-", "") in example.prompt
    for example in tasks.held_out_examples("add", 60):
        a, b = (int(n) for n in re.findall(r"\d+", example.prompt))
        assert example.answer == str(a + b)
    for example in tasks.held_out_examples("recall", 60):
        asked = re.search(r"What is ([A-Z])\??$", example.prompt, re.IGNORECASE)
        assert asked and example.answer.startswith(f"{asked[1]}=")
        assert example.prompt.count(example.answer) == 1
    for example in tasks.held_out_examples("times", 60):
        lines = example.answer.split("\n")
        assert re.search(rf" {len(lines)} times", example.prompt)
        word = lines[0].split(" ", 1)[1]
        assert lines == [f"{n}/{len(lines)} {word}" for n in range(1, len(lines) + 1)]


def test_the_prompt_decides_the_length() -> None:
    lengths = [len(tasks.draw(random.Random(n)).answer.encode()) for n in range(3000)]
    assert min(lengths) <= 2
    assert max(lengths) >= 300


def test_a_turn_is_what_the_chat_template_makes() -> None:
    ids = files.encode_turn("user", "hé")
    assert ids == [files.SPECIAL_IDS["<|user|>"], *"hé".encode(), files.SPECIAL_IDS["<|end|>"]]
