"""What comes through the split is what one plain vLLM engine answers, token by token.

The prompts are random and sent all at once, so that chunks, batches and hand-offs of different
requests overlap. The model is the random one, whose every token depends on the whole prompt; every
engine has one thread, with which results do not depend on the batch.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.plain_engine import PlainEngine
from tests.e2e.serving import Answer, ServeProcess, complete_all, get_json, until_idle
from tests.leaks import LeakBaseline
from tests.random_model import EXACT

NUM_PROMPTS = 208
MAX_PROMPT_TOKENS = 900
OUTPUT_TOKENS = 24
# Sums over a few rows add up in another order than over many (AVX2, float32); the least step
# between two logprobs of different tokens is far above.
LOGPROB_TOLERANCE = 1e-4
Case = dict[str, Any]


def _prompt(rng: random.Random, num_tokens: int | None = None) -> list[int]:
    length = num_tokens or rng.randint(1, MAX_PROMPT_TOKENS)
    return [rng.randrange(256) for _ in range(length)]


def _greedy(rng: random.Random) -> list[Case]:
    """Lengths from 1 to 900, the edges of blocks (128) and chunks (512) among them."""
    edges = [1, 2, 127, 128, 129, 255, 256, 511, 512, 513, 640, 900]
    lengths = edges + [rng.randint(1, MAX_PROMPT_TOKENS) for _ in range(NUM_PROMPTS - len(edges))]
    return [{"prompt": _prompt(rng, n), "params": {"max_tokens": OUTPUT_TOKENS}} for n in lengths]


def _sampled(rng: random.Random) -> list[Case]:
    """Everything that a restart of the sampler's state between the two workers would change."""
    variants: list[dict[str, Any]] = [
        {"seed": 7, "temperature": 1.0},
        {"seed": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"seed": 9, "temperature": 1.3, "min_p": 0.05},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.2},
        {"repetition_penalty": 1.4},
        {"seed": 10, "temperature": 1.0, "presence_penalty": 0.8, "repetition_penalty": 1.2},
        {"logprobs": 5},
        {"seed": 11, "temperature": 1.0, "logprobs": 3},
        {"min_tokens": 6, "logit_bias": {"256": 50.0}},
        {"logit_bias": {"65": 5.0, "66": 5.0}, "seed": 12, "temperature": 1.0},
        {"seed": 13, "temperature": 1.0, "n": 3},
        {"ignore_eos": True, "logit_bias": {"256": 20.0}},
        {"stop_token_ids": list(range(60, 90))},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"allowed_token_ids": [65, 66, 67]},
    ]
    return [
        {"prompt": _prompt(rng), "params": {"max_tokens": OUTPUT_TOKENS, **variant}}
        for variant in variants
        for _ in range(3)
    ]


def _structured(rng: random.Random) -> list[Case]:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
        "required": ["name", "n"],
    }
    guides: list[dict[str, Any]] = [
        {"regex": "[a-f]{4}-[0-9]{4}"},
        {"json": json.dumps(schema)},
        {"choice": ["alpha", "beta", "gamma"]},
    ]
    return [
        {
            "prompt": _prompt(rng),
            "params": {"max_tokens": 40, "structured_outputs": guide, "seed": 5, **extra},
        }
        for guide in guides
        for extra in ({"temperature": 0.0}, {"temperature": 1.0})
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def plain(random_model_dir: str, leak_baseline: LeakBaseline) -> Iterator[PlainEngine]:
    with PlainEngine(random_model_dir, EXACT[1]) as engine:
        leak_baseline.own_process(engine.process.pid)
        leak_baseline.own_path(Path(engine.folder))
        yield engine


def _body(model: str, case: Case) -> dict[str, Any]:
    return {"model": model, "prompt": case["prompt"], **case["params"]}


def _differences(case: Case, want: dict[str, Any], got: Answer) -> list[str]:
    """What a client could tell apart."""
    found = [
        f"{name}: {want[name]!r} != {getattr(got, name)!r}"
        for name in ("token_ids", "text", "finish_reason", "stop_reason")
        if want[name] != getattr(got, name)
    ]
    # A slow reader gets steps merged, so its states are a subset of the engine's, in order.
    states = set(want["prefixes"])
    found += [f"no such prefix: {p!r}" for p in got.prefixes if p not in states]
    if "logprobs" in case["params"]:
        if got.logprobs != pytest.approx(want["logprobs"], abs=LOGPROB_TOLERANCE):
            found.append(f"logprobs: {want['logprobs']} != {got.logprobs}")
        tops = [{f"token_id:{token}": value for token, value in t.items()} for t in want["top"]]
        pairs = zip(got.top_logprobs, tops, strict=True)
        if not all(g == pytest.approx(w, abs=LOGPROB_TOLERANCE) for g, w in pairs):
            found.append("top logprobs differ")
    return found


def _compare(cases: list[Case], wanted: list[Any], answers: list[list[Answer]]) -> None:
    wrong = []
    for case, want, got in zip(cases, wanted, answers, strict=True):
        for index, (w, g) in enumerate(zip(want, got, strict=True)):
            differences = _differences(case, w, g)
            if differences:
                params = case["params"]
                wrong.append(f"{len(case['prompt'])} tokens, {params}, #{index}: {differences}")
    assert not wrong, f"{len(wrong)} of {len(cases)} differ:\n" + "\n".join(wrong[:10])


@pytest.mark.parametrize("kind", ["greedy", "sampled", "structured"])
async def test_split_equals_one_engine(
    random_server: ServeProcess, plain: PlainEngine, kind: str
) -> None:
    rng = random.Random(20261121)
    cases = {"greedy": _greedy, "sampled": _sampled, "structured": _structured}[kind](rng)
    wanted = await asyncio.to_thread(plain.run, cases)
    before = await get_json(f"{random_server.url}/debug/state")
    answers = await complete_all(random_server.url, [_body("tiny", case) for case in cases])
    _compare(cases, wanted, answers)
    await until_idle(random_server.url)
    after = await get_json(f"{random_server.url}/debug/state")
    _check_that_decode_computed_no_prompt(before, after, cases)


def _check_that_decode_computed_no_prompt(
    before: dict[str, Any], after: dict[str, Any], cases: list[Case]
) -> None:
    """The decode side computed the last token of each prompt that it pulled, and no other."""
    deltas = {}
    for old, new in zip(before["workers"], after["workers"], strict=True):
        counts = old["engine"] or {}
        deltas[new["role"]] = {
            name: value - counts.get(name, 0) for name, value in new["engine"].items()
        }
    decode = deltas["decode"]
    assert decode["num_pulls"] > 0
    assert decode["num_failed_pulls"] == 0
    assert decode["num_recomputed_pulled_tokens"] == 0
    # A request for one token has nothing to hand off: it is whole, and may be on either worker.
    wholes = [len(case["prompt"]) for case in cases if case["params"]["max_tokens"] == 1]
    sums = {sum(part) for n in range(len(wholes) + 1) for part in combinations(wholes, n)}
    assert decode["num_computed_prompt_tokens"] - decode["num_pulls"] in sums
    prompt_tokens = sum(len(case["prompt"]) for case in cases)
    assert deltas["prefill"]["num_computed_prompt_tokens"] <= 3 * prompt_tokens


async def test_stop_strings_across_the_first_tokens(
    random_server: ServeProcess, plain: PlainEngine
) -> None:
    """Stop strings made from what each prompt really answers: within token 1, across 1-2, across
    2-3, and later; excluded from and included in the text."""
    rng = random.Random(3)
    base: list[Case] = [
        {"prompt": _prompt(rng), "params": {"max_tokens": OUTPUT_TOKENS}} for _ in range(40)
    ]
    answered = await asyncio.to_thread(plain.run, base)
    cases: list[Case] = []
    for case, (answer,) in zip(base, answered, strict=True):
        text = answer["text"]
        for start, end in ((0, 1), (0, 2), (1, 3), (0, 3), (2, 4), (4, 7)):
            stop = text[start:end]
            if len(stop) == end - start and "�" not in stop:
                for include in (False, True):
                    params: dict[str, Any] = {
                        **case["params"],
                        "stop": [stop, "never-to-be-seen"],
                        "include_stop_str_in_output": include,
                    }
                    cases.append({"prompt": case["prompt"], "params": params})
    assert len(cases) >= 100
    wanted = await asyncio.to_thread(plain.run, cases)
    answers = await complete_all(random_server.url, [_body("tiny", case) for case in cases])
    _compare(cases, wanted, answers)
    assert sum(a.finish_reason == "stop" for (a,) in answers) >= 100
    await until_idle(random_server.url)


async def test_first_token_inside_a_character(
    random_server: ServeProcess, plain: PlainEngine
) -> None:
    """A grammar makes the answer start with multi-byte characters: the first token alone has no
    text, and the character leaves whole with a later one."""
    rng = random.Random(4)
    guides = ["(é|ü){3}x", "(漢|字){2}", "(😀|🎉){2}!"]
    extras: list[dict[str, Any]] = [{}, {"seed": 2, "temperature": 1.0}, {"stop": ["x", "!"]}]
    cases: list[Case] = [
        {
            "prompt": [rng.randrange(97, 123) for _ in range(rng.randint(1, 300))],
            "params": {"max_tokens": 20, "structured_outputs": {"regex": guide}, **extra},
        }
        for guide in guides
        for extra in extras
    ]
    wanted = await asyncio.to_thread(plain.run, cases)
    answers = await complete_all(random_server.url, [_body("tiny", case) for case in cases])
    _compare(cases, wanted, answers)
    for (answer,) in answers:
        assert answer.prefixes[0] == "", "the first byte of a character was sent as text"
        assert answer.text and "�" not in answer.text


async def test_whole_equals_one_engine(
    random_whole_server: ServeProcess, plain: PlainEngine
) -> None:
    rng = random.Random(6)
    cases = _greedy(rng)[:60] + _sampled(rng)[:40]
    wanted = await asyncio.to_thread(plain.run, cases)
    answers = await complete_all(random_whole_server.url, [_body("tiny", case) for case in cases])
    _compare(cases, wanted, answers)
    state = await get_json(f"{random_whole_server.url}/debug/state")
    assert all(worker["engine"]["num_pulls"] == 0 for worker in state["workers"])
    await until_idle(random_whole_server.url)
