"""What the built-in model can do: small tasks whose prompt decides the answer, and its length.

Training data, held-out questions and the checks of the tests all come from here. Every answer can
be computed from its prompt, so a wrong KV block shows as a wrong answer. Standard library only.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tinfer.tiny_model.words import (
    ANIMALS,
    CATEGORIES,
    NAMES,
    ODD_QUESTIONS,
    PLACES,
    SMALL_TALK,
    THINGS,
    UNKNOWN_ANSWER,
    WORDS,
)

MAX_COUNT_SPAN = 120  # numbers in one answer: up to about 480 tokens
MAX_NUMBER = 299
MAX_REPEAT_BYTES = 32
MAX_TIMES = 40
MAX_TERM = 20
MAX_NOTES = 24
_DRAWS_PER_EXAMPLE = 20  # enough to meet nearly all prompts of a task that has few
# One prompt in 16 is never trained on; which ones follows from the prompt alone.
HELD_OUT_ONE_IN = 16


class Example(NamedTuple):
    """One question and the one right answer."""

    task: str
    prompt: str
    answer: str


def is_held_out(prompt: str) -> bool:
    """Whether training never sees this prompt as a whole."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0


def draw(
    rng: random.Random,
    task: str | None = None,
    held_out: bool = False,
    mix: Mix | None = None,
) -> Example:
    """A random example, of `task` if given, else of the tasks in `mix` by their weights; from the
    held-out prompts or from the others."""
    mix = mix or COPYING_FIRST
    while True:
        name = task or rng.choices(list(mix), weights=list(mix.values()))[0]
        prompt, answer = TASKS[name](rng)
        if name in _FIXED or is_held_out(prompt) == held_out:
            return Example(name, prompt, answer)


def held_out_examples(task: str, num: int, seed: int = 0) -> list[Example]:
    """`num` different held-out examples of a task, fewer where it has no more; the same ones for
    the same seed."""
    if task in _FIXED:
        raise ValueError(f"{task} has no held-out prompts")
    rng = random.Random(f"held out {task} {seed}")
    found: dict[str, Example] = {}
    for _ in range(_DRAWS_PER_EXAMPLE * num):
        example = draw(rng, task, held_out=True)
        found[example.prompt] = example
        if len(found) == num:
            break
    return list(found.values())


def count_answer(first: int, last: int) -> str:
    """The numbers from `first` to `last`, up or down, with single spaces."""
    step = 1 if last >= first else -1
    return " ".join(str(n) for n in range(first, last + step, step))


def _casual(rng: random.Random, prompt: str) -> str:
    """The way people type: now and then without the capital or the full stop."""
    if rng.random() < 0.3:
        prompt = prompt[0].lower() + prompt[1:]
    if rng.random() < 0.3:
        prompt = prompt.rstrip(".?!")
    return prompt


def _pick(rng: random.Random, forms: Sequence[str], **values: object) -> str:
    return _casual(rng, rng.choice(forms).format(**values))


def _count(rng: random.Random) -> tuple[str, str]:
    first = rng.choice((0, 1, 1, 1, rng.randint(0, 99), rng.randint(0, MAX_NUMBER)))
    span = rng.randint(1, rng.choice((9, 9, 30, MAX_COUNT_SPAN - 1)))
    last = min(first + span, MAX_NUMBER)
    if last == first:
        first -= 1
    if rng.random() < 0.2:
        first, last = last, first
        forms: tuple[str, ...] = (
            "Count down from {a} to {b}.",
            "Count backwards from {a} to {b}.",
        )
    elif first == 1 and rng.random() < 0.6:
        forms = ("Count to {b}.", "Please count to {b}.", "Can you count to {b}?")
    else:
        forms = (
            "Count from {a} to {b}.",
            "Please count from {a} to {b}.",
            "Count up from {a} to {b}.",
        )
    return _pick(rng, forms, a=first, b=last), count_answer(first, last)


def _repeat(rng: random.Random) -> tuple[str, str]:
    text = _phrase(rng)
    form = rng.choice(("Repeat: {}", "Repeat after me: {}", "Say: {}", "repeat: {}", "Echo: {}"))
    return form.format(text), text


def _phrase(rng: random.Random) -> str:
    """Words, made-up words, letters and digits, or characters of several bytes; no word twice."""
    kind = rng.random()
    if kind < 0.15:
        letters = string.ascii_letters + string.digits
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 24)))
    words: list[str] = []
    size = rng.randint(2, rng.choice((16, MAX_REPEAT_BYTES, MAX_REPEAT_BYTES)))
    while True:
        word = rng.choice(WORDS) if rng.random() < 0.6 else _made_up(rng)
        if kind > 0.7:
            word = rng.choice((word.capitalize(), word + ",", str(rng.randint(0, 999)), word))
        if kind > 0.9:
            word = rng.choice(
                (word, rng.choice(("é", "ü", "ñ", "ß", "好", "你", "世界", "🙂", "→", "Ω")))
            )
        if len(" ".join([*words, word]).encode()) > size:
            break
        if word not in words:
            words.append(word)
    return " ".join(words) or rng.choice(WORDS)


def _made_up(rng: random.Random) -> str:
    parts = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))
    )
    return "".join(parts) + rng.choice(("", "n", "r", "s", "t"))


def _spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice((rng.choice(WORDS), rng.choice(THINGS), _made_up(rng), _made_up(rng)))
    if rng.random() < 0.1:
        word = word.upper()
    forms = ("Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Please spell {w}.")
    return _pick(rng, forms, w=word), "-".join(word)


def _times(rng: random.Random) -> tuple[str, str]:
    word = rng.choice((rng.choice(WORDS), _made_up(rng)))
    times = rng.randint(1, rng.choice((6, 15, MAX_TIMES)))
    forms = ("Write {w} {n} times.", "Write the word {w} {n} times.", "Say {w} {n} times.")
    lines = "\n".join(f"{n}/{times} {word}" for n in range(1, times + 1))
    return _pick(rng, forms, w=word, n=times), lines


def _list(rng: random.Random) -> tuple[str, str]:
    name, members = rng.choice(list(CATEGORIES.items()))
    num = rng.randint(2, len(members))
    forms = ("List {n} {c}.", "Name {n} {c}.", "Give me {n} {c}.", "Tell me {n} {c}.")
    lines = (f"{n}/{num} {member}" for n, member in enumerate(members[:num], 1))
    return _pick(rng, forms, n=num, c=name), "\n".join(lines)


def _add(rng: random.Random) -> tuple[str, str]:
    most = rng.choice((9, 9, MAX_TERM))
    a, b = rng.randint(0, most), rng.randint(0, most)
    forms = (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "{a} + {b}",
        "{a} + {b} =",
        "Add {a} and {b}.",
    )
    return _pick(rng, forms, a=a, b=b), str(a + b)


def _story(rng: random.Random) -> tuple[str, str]:
    animal, name = rng.choice(ANIMALS), rng.choice(NAMES)
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    is_long = rng.random() < 0.4
    about = f"a {animal} named {name}, {place} and a {thing}"
    kind = "long " if is_long else rng.choice(("short ", ""))
    prompt = _pick(
        rng, ("Tell me a {k}story about {t}.", "Write a {k}story about {t}."), k=kind, t=about
    )
    if is_long:
        sentences = [
            f"Long ago a {animal} named {name} had a house near {place}.",
            f"In a dark night {name} saw a {thing} there.",
            f'"What a fine {thing}!" said {name}.',
            f"The {animal} took the {thing} to {place}.",
            f"Everybody at {place} wanted to see the {thing}.",
            f'An old {animal} asked: "Is this your {thing}, {name}?"',
            f'"No," said {name}, "I only found it."',
            f"So they looked for the owner of the {thing} all day.",
            f"In the evening the owner came and thanked {name}.",
            f"{name} the {animal} slept very well that night.",
        ]
    else:
        sentences = [
            f"Once there was a {animal} named {name}.",
            f"{name} lived near {place}.",
            f"One day {name} found a {thing}.",
            f"And {name} was happy.",
        ]
    return prompt, " ".join(sentences)


def _recall(rng: random.Random) -> tuple[str, str]:
    """A long prompt with a short answer: the answer lies somewhere in the notes."""
    letters = rng.sample(string.ascii_uppercase, rng.randint(1, rng.choice((4, 12, MAX_NOTES))))
    notes = {letter: f"{letter}={rng.randint(100, 999)}" for letter in letters}
    asked = rng.choice(letters)
    forms = ("Note that {n}. What is {a}?", "Remember {n}. What is {a}?")
    return _pick(rng, forms, n=", ".join(notes.values()), a=asked), notes[asked]


def _small_talk(rng: random.Random) -> tuple[str, str]:
    forms, answer = rng.choice(SMALL_TALK)
    return _casual(rng, rng.choice(forms)), answer


def _unknown(rng: random.Random) -> tuple[str, str]:
    form = rng.choice(ODD_QUESTIONS)
    values = {
        "w": rng.choice(WORDS),
        "v": _made_up(rng),
        "a": rng.choice(ANIMALS),
        "t": rng.choice(THINGS),
    }
    return _pick(rng, (form,), **values), UNKNOWN_ANSWER


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "count": _count,
    "repeat": _repeat,
    "spell": _spell,
    "times": _times,
    "list": _list,
    "add": _add,
    "story": _story,
    "recall": _recall,
    "small_talk": _small_talk,
    "unknown": _unknown,
}
Mix = Mapping[str, int]

# Copying is the hardest to learn and the most telling, so it is drawn most.
COPYING_FIRST: Mix = {
    "count": 20,
    "repeat": 34,
    "spell": 12,
    "times": 6,
    "list": 4,
    "add": 8,
    "story": 4,
    "recall": 12,
    "small_talk": 2,
    "unknown": 3,
}
# Once it can copy, the others catch up.
EVEN_MIX: Mix = {
    "count": 20,
    "repeat": 20,
    "spell": 14,
    "times": 10,
    "list": 6,
    "add": 9,
    "story": 5,
    "recall": 10,
    "small_talk": 2,
    "unknown": 3,
}
# Few fixed sentences, all of them learnt by heart.
_FIXED = frozenset({"small_talk"})
