"""What the stepped engines go through; the tests of `test_engine_scheduler` read the records."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from tests.e2e.stepped_engine import BLOCK_TOKENS, Record, Stepped
from tinfer.core.sampling import StructuredSpec
from tinfer.worker.grammar_watch import GrammarWatch

LONG, NEXT = 4096, 100
NUM_SHORT = 6
ANSWER = 90
SCHEMA = (
    '{"type": "object", "properties": {"n": {"type": "integer"},'
    ' "s": {"type": "string", "minLength": 200}}, "required": ["n", "s"]}'
)
# Everything that a preemption could lose: the generator, penalties, the grammar's state.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7},
    "penalties": {
        "temperature": 0.9,
        "seed": 8,
        "presence_penalty": 0.8,
        "repetition_penalty": 1.2,
        "logprobs": 2,
    },
    "regex": {"structured": StructuredSpec(regex="([a-f]{4}-[0-9]{4} ){40}")},
    "json": {"structured": StructuredSpec(json=SCHEMA), "temperature": 1.0, "seed": 9},
}


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Random letters: after bytes that are no text, vLLM gives out those with the answer."""
    rng = random.Random(seed)
    return [rng.randrange(97, 123) for _ in range(num_tokens)]


def budgets(model_dir: str) -> Record:
    """Sequences that decode, two prompts beside them, and a budget that changes."""
    engine = Stepped(model_dir, num_blocks=256)
    for number in range(NUM_SHORT):
        engine.start(f"short-{number}", prompt(20, number), max_tokens=150)
    engine.step(3)
    engine.note("prompts")
    engine.start("long", prompt(LONG, 10), max_tokens=4)
    engine.start("next", prompt(NEXT, 11), max_tokens=4)
    for tokens, num_steps in ((64, 10), (128, 5), (0, 5), (1, 2), (None, 2), (100_000, 1)):
        engine.budget(tokens)
        engine.step(num_steps)
    engine.budget(64)
    engine.until(lambda: "next" in engine.record.answers)
    engine.drain()
    return engine.done()


def pulls(model_dir: str) -> Record:
    """Pulls beside, behind and in front of prompts that get no tokens, one of which fails."""
    engine = Stepped(model_dir, num_blocks=512)
    prompts = {name: prompt(length, length) for name, length in (("a", 300), ("b", 200), ("c", 9))}
    sources = {name: engine.prefill(name, tokens) for name, tokens in prompts.items()}
    engine.start("short", prompt(20, 1), max_tokens=600)
    engine.start("half", prompt(600, 2), max_tokens=3)
    engine.budget(100)
    engine.step(3)
    engine.budget(0)
    engine.note("none")
    engine.start("waits", prompt(300, 3), max_tokens=3)
    nobody = msgspec.structs.replace(sources["b"], worker_id="nobody")
    engine.decode("pull-b", prompts["b"], nobody, max_tokens=5)
    engine.decode("pull-a", prompts["a"], sources["a"], max_tokens=30)
    engine.until(lambda: len(engine.record.pulls) == 2)
    engine.decode("pull-c", prompts["c"], sources["c"], max_tokens=30)
    engine.until(lambda: len(engine.record.answers.get("pull-c", ())) >= 5)
    engine.budget(None)
    engine.note("any")
    engine.engine.release_lease(sources["b"].lease)
    engine.until(lambda: {"half", "waits", "pull-b"} <= engine.record.finished.keys())
    source = engine.prefill("d", prompts["a"])
    engine.start("huge", prompt(LONG, 4), max_tokens=3)
    engine.step(2)
    engine.note("full")
    engine.decode("pull-d", prompts["a"], source, max_tokens=3)
    engine.step()
    engine.budget(0)  # until the pull is done, which the next step is to find out
    engine.until(lambda: "pull-d" in engine.record.pulls)
    engine.budget(None)
    engine.note("ready")
    engine.drain()
    return engine.done()


def preemption(model_dir: str, num_blocks: int, num_rounds: int, tokens: int | None) -> Record:
    """All kinds at once, in rounds: each starts with another kind, so each has its turn as the
    youngest."""
    engine = Stepped(model_dir, num_blocks)
    kinds = list(KINDS)
    for number in range(num_rounds):
        engine.budget(0)
        for kind in kinds[number:] + kinds[:number]:
            engine.start(
                f"{kind}-{number}", prompt(64, kinds.index(kind)), max_tokens=ANSWER, **KINDS[kind]
            )
        engine.until_compiled()
        engine.budget(tokens)
        engine.drain()
    return engine.done()


def elsewhere(model_dir: str) -> Record:
    """Preempted requests wait, hold nothing and keep nobody waiting; what they had comes to them
    as blocks."""
    engine = Stepped(model_dir, num_blocks=16)
    engine.parks = True
    kinds = list(KINDS)
    prompts = {}
    for number in range(len(kinds)):
        for kind in kinds[number:] + kinds[:number]:
            name = f"{kind}-{number}"
            prompts[name] = prompt(64, kinds.index(kind))
            engine.start(name, prompts[name], max_tokens=ANSWER, **KINDS[kind])
        engine.until_compiled()
        engine.until(lambda: not engine.has_unparked())
        engine.note(f"parked-{number}")
        engine.record.notes[f"used-{number}"] = engine.engine.stats().num_used_blocks
        while engine.parked:
            name = engine.parked[0]
            tokens = prompts[name] + engine.record.answers.get(name, [])
            engine.resume(engine.prefill(f"{name}~again", tokens))
            engine.until(partial(engine.is_done_with, name))
    return engine.done()


def gone(model_dir: str) -> Record:
    """A preempted request is aborted before it is told of the blocks that it was to read."""
    engine = Stepped(model_dir, num_blocks=16)
    engine.parks = True
    for number in range(3):
        engine.start(f"whole-{number}", prompt(64, number), max_tokens=130)
    engine.until(lambda: not engine.has_unparked())
    name = engine.parked[0]
    source = engine.prefill("again", prompt(64, 0) + engine.record.answers[name])
    engine.engine.abort([name])
    engine.resume(source)
    engine.until(lambda: engine.record.num_ended_leases == 1)
    engine.resume()
    engine.drain()
    return engine.done()


def victim(model_dir: str) -> Record:
    """Memory for either of two: a prompt that goes on slowly, and a younger sequence that has
    overtaken it through a pull and grows."""
    engine = Stepped(model_dir, num_blocks=16)
    source = engine.prefill("source", prompt(60, 1))
    engine.budget(1)
    engine.start("prompt", prompt(240, 2), max_tokens=5)
    engine.step(3)
    engine.decode("grows", prompt(60, 1), source, max_tokens=220)
    engine.until(lambda: "grows" in engine.record.finished)
    engine.budget(None)
    engine.drain()
    return engine.done()


def open_lease(model_dir: str) -> Record:
    """Blocks are missing while a lease is open whose reader does not come."""
    engine = Stepped(model_dir, num_blocks=16)
    source = engine.prefill("held", prompt(200, 1))
    for number in range(2):
        engine.start(f"whole-{number}", prompt(32, number), max_tokens=130)
    engine.until(lambda: len(engine.record.finished) == 2)
    engine.note("finished")
    engine.record.notes["open_leases"] = engine.engine.stats().num_open_leases
    engine.engine.release_lease(source.lease)
    engine.drain()
    return engine.done()


def ending_lease(model_dir: str) -> Record:
    """Blocks are missing, but those of a lease that has just ended come back with this step."""
    engine = Stepped(model_dir, num_blocks=16)
    source = engine.prefill("held", prompt(200, 1))
    for number in range(2):
        engine.start(f"whole-{number}", prompt(32, number), max_tokens=130)
    engine.until(lambda: engine.engine.stats().num_free_blocks == 0)
    engine.note("full")
    # Its end is seen when a block is missing, in the middle of a step.
    scheduler: Any = engine.engine._scheduler
    allocate = scheduler.kv_cache_manager.allocate_slots

    def allocate_or_release(*args: Any, **kwargs: Any) -> Any:
        blocks = allocate(*args, **kwargs)
        if blocks is None:
            engine.engine.release_lease(source.lease)
        return blocks

    scheduler.kv_cache_manager.allocate_slots = allocate_or_release
    engine.drain()
    return engine.done()


def shortest_first(model_dir: str) -> Record:
    """Short prompts that come while a long one is computed, and two that no block is left for."""
    engine = Stepped(model_dir, num_blocks=48, prefill_order="srpt")
    engine.budget(64)
    engine.start("long", prompt(LONG // 4, 1), max_tokens=3)
    engine.step(3)
    engine.note("shorts")
    engine.start("twenty", prompt(20, 2), max_tokens=3)
    engine.start("forty", prompt(40, 3), max_tokens=3)
    engine.step(2)
    engine.note("full")
    engine.start("large", prompt(30 * BLOCK_TOKENS, 4), max_tokens=3)
    engine.start("larger", prompt(31 * BLOCK_TOKENS, 5), max_tokens=3)
    engine.step(4)
    engine.drain()
    return engine.done()


def slow_grammar(model_dir: str) -> Record:
    """A grammar that takes too long, for a request with blocks to pull, beside an answer."""
    engine = Stepped(model_dir, num_blocks=256)
    scheduler: Any = engine.engine._scheduler
    compiler, go_on = scheduler.structured_output_manager, threading.Event()
    create = compiler._create_grammar

    def create_late(request: Any) -> Any:
        if request.request_id.startswith("slow"):
            go_on.wait()
        return create(request)

    compiler._create_grammar = create_late
    scheduler.grammar_watch = GrammarWatch(max_compile_s=0.1)
    source = engine.prefill("held", prompt(100, 1))
    regex = StructuredSpec(regex="[a-f]{40}")
    engine.start("answer", prompt(20, 2), max_tokens=4000)
    engine.decode("slow", prompt(100, 1), source, max_tokens=5, structured=regex)
    engine.note("begun")
    engine.until(lambda: "slow" in engine.record.refused)
    engine.note("refused")
    go_on.set()
    engine.start("guided", prompt(20, 3), max_tokens=10, structured=regex)
    engine.until(lambda: "guided" in engine.record.finished)
    engine.engine.abort(["answer"])
    engine.drain()
    return engine.done()


SCENARIOS: dict[str, Callable[[str], Record]] = {
    "budgets": budgets,
    "pulls": pulls,
    "undisturbed": partial(preemption, num_blocks=256, num_rounds=1, tokens=None),
    "preemption": partial(preemption, num_blocks=16, num_rounds=len(KINDS), tokens=None),
    "small_chunks": partial(preemption, num_blocks=16, num_rounds=len(KINDS), tokens=16),
    "elsewhere": elsewhere,
    "gone": gone,
    "shortest_first": shortest_first,
    "victim": victim,
    "open_lease": open_lease,
    "ending_lease": ending_lease,
    "slow_grammar": slow_grammar,
}
