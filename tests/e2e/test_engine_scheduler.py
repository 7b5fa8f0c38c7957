"""vLLM's scheduler as we extend it: prefill budgets, pulls beside them, victims and reports.

The engines are real, stepped by hand in a process of their own (`stepped_engine`), on the random
model with one thread. What is checked is what each step was made of, as vLLM put it together.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from tests.e2e.engine_scenarios import ANSWER, KINDS, LONG, NEXT, NUM_SHORT, SCENARIOS
from tests.e2e.stepped_engine import Record, StepRecord

# All scenarios are run in the set-up of the first test.
pytestmark = pytest.mark.timeout(300)
MAX_TOKENS = 512  # of a step, see `Stepped`
Records = Mapping[str, Record]
PREEMPTED = ["preemption", "small_chunks", "elsewhere"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, random_model_dir: str) -> Records:
    """What all scenarios left, run one after the other."""
    out = tmp_path_factory.mktemp("scenarios")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.stepped_engine", random_model_dir, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: _read(out / f"{name}.json") for name in SCENARIOS}


def _read(path: Path) -> Record:
    return msgspec.json.decode(path.read_bytes(), type=Record)


def budgeted(step: StepRecord) -> int:
    return sum(piece.budgeted_tokens for piece in step.pieces.values())


# --- budgets


def test_a_step_has_all_decodes_and_as_many_prompt_tokens_as_the_budget_says(
    records: Records,
) -> None:
    """From the first step after a change on; None is what fits, and so is more than that."""
    record = records["budgets"]
    left = LONG + NEXT
    seen = set()
    for step in record.steps[record.notes["prompts"] :]:
        assert all(step.pieces[name].tokens == 1 for name in step.decoding)
        room = MAX_TOKENS - len(step.decoding)
        budget = room if step.budget is None else min(room, step.budget)
        assert budgeted(step) == min(left, budget)
        left -= budgeted(step)
        seen.add(step.budget)
    assert left == 0
    assert seen == {64, 128, 0, 1, None, 100_000}
    beside = [step for step in record.steps if "long" in step.pieces or "next" in step.pieces]
    assert all(len(step.decoding) >= NUM_SHORT for step in beside)
    assert len(record.finished) == NUM_SHORT + 2


def test_prompts_are_computed_in_order_of_arrival(records: Records) -> None:
    record = records["budgets"]
    starts = {"long": 0, "next": 0}
    for step in record.steps[record.notes["prompts"] :]:
        for name, length in (("long", LONG), ("next", NEXT)):
            if name in step.pieces and starts[name] < length:
                assert step.pieces[name].start == starts[name]
                starts[name] += step.pieces[name].tokens
        assert starts["next"] == 0 or starts["long"] == LONG
    assert starts == {"long": LONG, "next": NEXT}


def test_a_short_prompt_is_computed_in_the_next_step_beside_a_long_one(records: Records) -> None:
    record = records["shortest_first"]
    first, second = record.steps[record.notes["shorts"] :][:2]
    assert {name: piece.tokens for name, piece in first.pieces.items()} == {
        "twenty": 20,
        "forty": 40,
        "long": 4,
    }
    # The two decode now, and the long one has the whole budget again.
    assert {name: piece.tokens for name, piece in second.pieces.items()} == {
        "twenty": 1,
        "forty": 1,
        "long": 64,
    }
    # Those that wait for blocks keep nobody from the budget, not even by turns.
    for step in record.steps[record.notes["full"] :]:
        if "long" in step.pieces and step.pieces["long"].budgeted_tokens:
            left = LONG // 4 - step.pieces["long"].start
            assert step.pieces["long"].tokens == min(64, left) or budgeted(step) == 64
    assert record.finished.keys() >= {"long", "twenty", "forty", "large"}


@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - {"ending_lease"}))
def test_no_decode_misses_a_step(records: Records, name: str) -> None:
    """Not even beside a preemption: who gives way is the last in line."""
    for step in records[name].steps:
        assert set(step.decoding) - set(step.preempted) <= step.pieces.keys()


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_step_passes_its_budget(records: Records, name: str) -> None:
    for step in records[name].steps:
        assert step.budget is None or budgeted(step) <= step.budget
        assert sum(piece.tokens for piece in step.pieces.values()) <= MAX_TOKENS


@pytest.mark.parametrize("name", SCENARIOS)
def test_progress_is_what_was_computed_and_is_not_done(records: Records, name: str) -> None:
    for step in records[name].steps:
        expected = {}
        for request, piece in step.pieces.items():
            end = piece.start + piece.tokens
            if end < piece.prompt_tokens + piece.output_tokens:
                expected[request] = min(end, piece.prompt_tokens)
        assert dict(step.progress) == expected


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_totals_are_those_of_the_steps(records: Records, name: str) -> None:
    record = records[name]
    stats = record.stats
    assert stats["num_steps"] == sum(bool(step.pieces) for step in record.steps)
    assert stats["busy_s"] > 0
    assert stats["num_preemptions"] == sum(len(step.preempted) for step in record.steps)
    # The last token of a prompt that was pulled is of the prompt; one of an answer decodes.
    pulled = sum(
        ok for request, ok in record.pulls.items() if f"{request}~again" not in record.answers
    )
    computed = sum(budgeted(step) for step in record.steps)
    assert stats["num_computed_prompt_tokens"] == computed + pulled
    assert stats["num_free_blocks"] == record.num_blocks
    assert stats["num_used_blocks"] == stats["num_open_leases"] == 0


# --- pulls


def test_pulls_start_and_end_without_a_prefill_budget(records: Records) -> None:
    record = records["pulls"]
    assert record.pulls == {"pull-a": True, "pull-b": False, "pull-c": True, "pull-d": True}
    steps = record.steps[record.notes["none"] : record.notes["any"]]
    assert all(budgeted(step) == 0 for step in steps)
    assert {n for step in steps for n in step.pieces} == {"short", "pull-a", "pull-c"}
    assert all("short" in step.pieces for step in steps)
    for name, prompt_tokens in (("pull-a", 300), ("pull-c", 9)):
        pieces = [step.pieces[name] for step in steps if name in step.pieces]
        assert [piece.start for piece in pieces] == list(
            range(prompt_tokens - 1, prompt_tokens - 1 + len(pieces))
        )
        assert len(pieces) >= 5


def test_what_waited_for_a_budget_goes_on(records: Records) -> None:
    record = records["pulls"]
    assert record.stats["num_recomputed_pulled_tokens"] == 199
    assert set(record.finished) == set(record.arrivals) - {"a", "b", "c", "d"}
    computed = {name: 0 for name in ("half", "waits", "pull-b")}
    for step in record.steps:
        for name in computed:
            computed[name] += step.pieces[name].budgeted_tokens if name in step.pieces else 0
    assert computed == {"half": 600, "waits": 300, "pull-b": 200}


def test_a_pull_starts_and_ends_beside_a_prompt_that_fills_every_step(records: Records) -> None:
    record = records["pulls"]
    full, ready = record.notes["full"], record.notes["ready"]
    last, first = record.steps[full - 1 : full + 1]
    assert budgeted(last) == MAX_TOKENS - len(last.decoding)
    assert first.pulling == ["pull-d"]
    assert budgeted(first) == MAX_TOKENS - len(first.decoding) - 1
    step = record.steps[ready]
    assert (step.pieces["pull-d"].start, step.pieces["pull-d"].tokens) == (299, 1)
    assert step.pieces["huge"].budgeted_tokens == MAX_TOKENS - len(step.decoding) - 1


# --- preemption


@pytest.mark.parametrize("name", PREEMPTED)
def test_preempted_requests_go_on_exactly(records: Records, name: str) -> None:
    undisturbed, record = records["undisturbed"], records[name]
    assert undisturbed.stats["num_preemptions"] == 0
    answers = {name: one for name, one in record.answers.items() if not name.endswith("~again")}
    assert len(answers) == len(KINDS) ** 2
    for request, answer in answers.items():
        kind = request.rpartition("-")[0]
        assert answer == undisturbed.answers[f"{kind}-0"], request
        assert record.texts[request] == undisturbed.texts[f"{kind}-0"], request
        assert len(answer) == ANSWER
        assert record.finished[request] == "length"
    preempted = [request for step in record.steps for request in step.preempted]
    assert {request.rpartition("-")[0] for request in preempted} == set(KINDS)


def test_blocks_computed_elsewhere_spare_the_preempted_all_but_one_token(records: Records) -> None:
    """Who waits for them has none, and is in no step; who has them decodes at once."""
    record = records["elsewhere"]
    assert len(record.pulls) == record.stats["num_pulls"] > len(KINDS)
    assert all(record.pulls.values())
    assert {record.notes[f"used-{number}"] for number in range(len(KINDS))} == {0}
    for name in record.pulls:
        pieces = [step.pieces[name] for step in record.steps if name in step.pieces]
        assert all(piece.tokens == 1 for piece in pieces if piece.output_tokens)
    assert record.num_ended_leases == record.stats["num_pulls"]


def test_a_preempted_request_that_is_gone_reads_nothing(records: Records) -> None:
    record = records["gone"]
    assert record.num_ended_leases == 1
    assert record.stats["num_pulls"] == 0
    assert len(record.finished) == 2


def test_an_undisturbed_answer_is_what_was_asked(records: Records) -> None:
    """Without this the comparison could be one of nonsense with nonsense."""
    texts = records["undisturbed"].texts
    assert len(set(texts.values())) == len(KINDS)
    assert re.fullmatch("([a-f]{4}-[0-9]{4} ){9}", texts["regex-0"])
    assert re.match(r'\s*\{\s*"n"\s*:\s*-?[0-9]', texts["json-0"])


@pytest.mark.parametrize("name", [*PREEMPTED, "victim", "open_lease"])
def test_the_victim_is_the_least_progressed(records: Records, name: str) -> None:
    record = records[name]
    age = {request: -number for number, request in enumerate(record.arrivals)}
    num_victims = 0
    for step in record.steps:
        num_victims += len(step.preempted)
        for victim in step.preempted:
            for other in step.running.keys() - set(step.preempted):
                assert (step.running[victim], age[victim]) < (step.running[other], age[other])
    assert num_victims > 0


def test_a_prompt_gives_way_to_the_younger_sequence_that_has_overtaken_it(
    records: Records,
) -> None:
    record = records["victim"]
    (step,) = [step for step in record.steps if step.preempted]
    assert step.preempted == ["prompt"]
    # vLLM's own victim would have been the other, which it admitted last.
    assert record.arrivals.index("prompt") < record.arrivals.index("grows")
    assert step.running["grows"] > 100
    assert len(record.finished) == 2


def test_an_open_lease_makes_nobody_wait(records: Records) -> None:
    record = records["open_lease"]
    assert record.notes["open_leases"] == 1
    assert record.stats["num_preemptions"] > 0
    assert record.finished == {"whole-0": "length", "whole-1": "length"}
    assert record.num_ended_leases == 1


def test_blocks_that_come_back_with_this_step_are_waited_for(records: Records) -> None:
    record = records["ending_lease"]
    assert record.stats["num_preemptions"] == 0
    assert record.num_ended_leases == 1
    assert record.finished == {"whole-0": "length", "whole-1": "length"}


def test_a_grammar_that_takes_too_long_holds_up_nobody(records: Records) -> None:
    """Its request is refused, its lease ends, and the next one's grammar is compiled."""
    record = records["slow_grammar"]
    assert record.refused == {"slow": True}
    assert "slow" not in record.answers
    assert record.num_ended_leases == 1
    meanwhile = record.steps[record.notes["begun"] : record.notes["refused"]]
    assert len(meanwhile) >= 2
    assert all("answer" in step.pieces for step in meanwhile)
    assert record.finished["guided"] == "length"
    assert re.fullmatch("[a-f]{10}", record.texts["guided"])
