"""`tinfer bench frontend`: what it runs, what it counts, and how it sums up."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from typing import Any

import msgspec
import psutil
import pytest
from click.testing import CliRunner, Result

import tinfer.bench.frontend.app as app
from tinfer.bench.frontend.arms import modes_of, pace_of, server_of
from tinfer.bench.frontend.clocks import Used, parts_of, process_cpu_s, used
from tinfer.bench.frontend.options import (
    KINDS,
    MASTERS,
    FrontendOptions,
    Kind,
    parse_arms,
    parse_streams,
)
from tinfer.bench.frontend.points import (
    LONG_PROMPT_TOKENS,
    MAX_OUTPUT_TOKENS,
    Measured,
    Point,
    first_failure,
    long_plan_of,
    measured_of,
    plan_of,
    points_of,
)
from tinfer.bench.frontend.report import lines_of
from tinfer.bench.frontend.session import LoopLag, longest_lag_ms
from tinfer.bench.frontend.summary import ratios_of, rows_of
from tinfer.bench.outcome import LoadRun, Outcome
from tinfer.cli import main
from tinfer.config import load
from tinfer.errors import StartError

OPTIONS = FrontendOptions()


# --- arms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASTERS)
@pytest.mark.parametrize("mode", ["paced", "full", "unloaded"])
def test_a_master_is_started_with_options_that_it_takes(kind: Kind, mode: Any) -> None:
    argv = server_of(kind, mode, OPTIONS).argv
    result = CliRunner().invoke(main, [*argv[3:], "--port", "0", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert argv[:4] == (sys.executable, "-m", "tinfer", "serve")


def test_the_real_engine_of_ours_has_the_settings_of_vllm() -> None:
    ours, theirs = (server_of(kind, "full", OPTIONS) for kind in ("tinfer", "vllm-2"))
    result = CliRunner().invoke(main, [*ours.argv[3:], "--port", "0", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "1 worker" in result.output or "decode-0" not in result.output
    for flag in ("--max-num-seqs", "--max-model-len", "--kv-cache-memory-bytes"):
        values = [one.argv[one.argv.index(flag) + 1] for one in (ours, theirs)]
        assert values[0] == values[1]
    assert theirs.argv[theirs.argv.index("--api-server-count") + 1] == "2"
    assert theirs.environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("kind", "num_emitting"), [("master-whole", 2), ("master-split", 1)])
def test_engines_at_a_pace_make_the_rate_together(kind: Kind, num_emitting: int) -> None:
    step_s, seq_s = pace_of(kind, "paced", 8000.0)
    # A step of n streams takes n times as long as one of a single stream.
    assert step_s == 0 and num_emitting / seq_s == pytest.approx(8000.0)
    assert pace_of(kind, "full", 8000.0) == (0.0, 0.0)


def test_only_stand_ins_keep_to_a_pace() -> None:
    assert modes_of("relay") == ("paced", "full", "unloaded")
    assert modes_of("vllm-1") == modes_of("tinfer") == ("full",)


# --- clocks -----------------------------------------------------------------------------------


def test_processor_time_of_a_process_is_its_own_count() -> None:
    before_s, own_s = process_cpu_s(os.getpid()), time.process_time()
    while time.process_time() < own_s + 0.05:
        pass
    spent_s = time.process_time() - own_s
    assert process_cpu_s(os.getpid()) - before_s == pytest.approx(spent_s, rel=0.2)


def test_a_process_that_is_gone_is_an_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    with pytest.raises(OSError):
        process_cpu_s(process.pid)


def test_parts_are_told_apart_by_what_processes_call_themselves() -> None:
    code = "import sys; sys.stdin.read()"
    api = [sys.executable, "-c", code, "VLLM::APIServer_1"]
    with (
        subprocess.Popen(api, stdin=subprocess.PIPE) as further,
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as engine,
    ):
        front = os.getpid()
        family = [psutil.Process(pid) for pid in (front, further.pid, engine.pid)]
        parts = parts_of(front, family)
        assert parts == {front: "front", further.pid: "front", engine.pid: "engines"}
        counted = used(parts)
        for process in (further, engine):
            assert process.stdin is not None
            process.stdin.close()
    assert counted.front_s > counted.engines_s > 0
    assert counted.since(counted) == Used(0.0, 0.0)
    assert counted.whole_s == counted.front_s + counted.engines_s


# --- points -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_points_of_an_arm(kind: Kind) -> None:
    whats = {mode: [one.what for one in points_of(kind, mode, OPTIONS)] for mode in modes_of(kind)}
    streams = ["tokens"] * len(OPTIONS.streams)
    assert whats["full"] == [*streams, "requests"]
    if "paced" in whats:
        assert whats["unloaded"] == ["unloaded"]
        assert whats["paced"] == [*streams, *(["prompts"] if kind != "relay" else [])]


def test_a_point_has_as_many_tokens_as_its_time_takes() -> None:
    for point in points_of("master-whole", "paced", OPTIONS):
        wanted = OPTIONS.rate * OPTIONS.seconds
        tokens = point.num_requests * point.output_tokens
        assert wanted * 0.95 <= tokens <= wanted + max(point.streams, 16) * MAX_OUTPUT_TOKENS
        assert point.num_requests >= point.streams
    (alone, *_) = points_of("vllm-1", "full", OPTIONS)
    assert alone.num_requests * alone.output_tokens <= 200 * OPTIONS.seconds


def test_plans_are_the_same_again_and_no_two_prompts_alike() -> None:
    point = Point(what="tokens", mode="full", streams=4, num_requests=9, output_tokens=3)
    plan = plan_of(point, 1)
    assert plan == plan_of(point, 1) != plan_of(point, 2)
    bodies = [msgspec.json.decode(one.body) for one in plan]
    assert len({tuple(body["prompt"]) for body in bodies}) == 9
    assert {body["max_tokens"] for body in bodies} == {3} and bodies[0]["ignore_eos"] is True


def test_long_prompts_come_evenly_by_turns_as_ids_and_as_text() -> None:
    point = Point(
        what="prompts", mode="paced", streams=4, num_requests=9, output_tokens=3, num_long=4
    )
    plan = long_plan_of(point, 1)
    assert [one.planned_s for one in plan] == [0.25, 0.75, 1.25, 1.75]
    prompts = [msgspec.json.decode(one.body)["prompt"] for one in plan]
    assert [type(prompt) for prompt in prompts] == [list, str, list, str]
    assert {len(prompt) for prompt in prompts} == {LONG_PROMPT_TOKENS}


def outcome(chunk_s: list[float], asked_tokens: int = 0, error: str | None = None) -> Outcome:
    tokens = len(chunk_s)
    return Outcome(
        request_id="r",
        due_s=0.0,
        prompt_tokens=1,
        asked_tokens=asked_tokens or tokens,
        chunk_s=chunk_s,
        output_tokens=tokens,
        error=error,
    )


def test_what_is_added_is_beyond_the_engine_stand_ins_step() -> None:
    point = Point(what="unloaded", mode="unloaded", streams=1, num_requests=1, output_tokens=3)
    run = LoadRun(outcomes=[outcome([0.021, 0.042, 0.064])], duration_s=1.0, cpu_s=0.5)
    one = measured_of("relay", point, 0, run, Used(0.1, 0.2), None)
    assert one.added_ttft_ms == pytest.approx(1.0)
    assert one.added_itl_p50_ms == pytest.approx(1.5)
    assert one.added_itl_p99_ms == pytest.approx(1.99)
    assert (one.num_tokens, one.num_events, one.client_s) == (3, 3, 0.5)
    whole = measured_of(
        "relay", msgspec.structs.replace(point, what="tokens"), 0, run, Used(0, 0), 1
    )
    assert (whole.added_ttft_ms, whole.longest_lag_ms) == (None, 1.0)


def test_a_short_answer_or_a_failed_one_fails_the_run() -> None:
    assert first_failure([outcome([0.1])]) is None
    assert first_failure([outcome([0.1]), outcome([0.1], error="no")]) == "no"
    assert first_failure([outcome([0.1], asked_tokens=2)]) == (
        "an answer has 1 tokens instead of 2"
    )


def test_the_longest_lag_between_two_looks() -> None:
    bounds = [0.001, 0.01]
    before = LoopLag(bounds, [5, 0, 1])
    assert longest_lag_ms(before, LoopLag(bounds, [5, 0, 1])) == 0.0
    assert longest_lag_ms(before, LoopLag(bounds, [9, 0, 1])) == 1.0
    assert longest_lag_ms(before, LoopLag(bounds, [9, 2, 1])) == 10.0
    assert longest_lag_ms(before, LoopLag(bounds, [9, 2, 2])) == float("inf")


# --- summary ----------------------------------------------------------------------------------


def measured(
    arm: Kind, front_us: float, repetition: int = 0, mode: Any = "full", **changes: Any
) -> Measured:
    what = changes.pop("what", "tokens")
    tokens = 1000
    point = Point(
        what=what,
        mode=mode,
        streams=changes.pop("streams", 256),
        num_requests=tokens if what == "requests" else 10,
        output_tokens=1 if what == "requests" else 100,
        num_long=changes.pop("num_long", 0),
    )
    return Measured(
        arm=arm,
        point=point,
        repetition=repetition,
        num_tokens=tokens,
        num_events=tokens // 2,
        duration_s=0.1,
        front_s=front_us * tokens / 1e6,
        engines_s=changes.pop("engines_us", 10.0) * tokens / 1e6,
        client_s=0.01,
        ttft_p50_ms=1.0,
        **changes,
    )


def test_rows_are_medians_and_net_of_what_requests_cost() -> None:
    runs = [measured("relay", us, repetition) for repetition, us in enumerate((9.0, 30.0, 12.0))]
    runs += [measured("relay", 100.0, repetition, what="requests") for repetition in range(3)]
    tokens, requests = rows_of(runs)
    assert (tokens.what, requests.what) == ("tokens", "requests")
    assert tokens.front_us == pytest.approx(12.0) and tokens.whole_us == pytest.approx(22.0)
    # Ten requests of 100 us for 1000 tokens: 1 us of each token.
    assert tokens.net_front_us == pytest.approx(11.0)
    assert requests.net_front_us is None and requests.requests_per_s == pytest.approx(10_000)
    assert tokens.events_per_token == 0.5 and tokens.client_share == pytest.approx(0.1)


def test_a_ratio_is_of_the_same_repetition_and_to_the_better_vllm() -> None:
    runs = []
    for repetition, slow in enumerate((1.0, 2.0, 3.0)):  # the box, in that repetition
        runs += [
            measured("master-whole", 10 * slow, repetition, "paced"),
            measured("relay", 8 * slow, repetition, "paced"),
            measured("relay", 1 * slow, repetition, "full"),
            measured("vllm-1", 40 * slow, repetition, engines_us=10 * slow),
            measured("vllm-2", 20 * slow, repetition, engines_us=100.0 * slow),
            measured("tinfer", 10 * slow, repetition, engines_us=15 * slow),
        ]
    found = {(one.arm, one.to, one.figure): one for one in ratios_of(runs)}
    relay = found["master-whole", "relay", "front"]
    assert (relay.median, relay.least, relay.largest) == pytest.approx((1.25, 1.25, 1.25))
    assert found["master-whole", "vllm", "front"].median == pytest.approx(0.5)
    assert found["tinfer", "vllm", "front"].median == pytest.approx(0.5)
    # By all processes the first one is the better: 40 + 10 against 20 + 100.
    assert found["tinfer", "vllm", "whole"].largest == pytest.approx(25 / 50)
    assert ("master-split", "relay", "front") not in found


def test_what_is_shown() -> None:
    runs = [
        measured("relay", 8.0, mode="paced"),
        measured("master-whole", 12.0, mode="paced"),
        measured("master-whole", 300.0, what="requests", streams=64),
        measured(
            "master-whole",
            12.0,
            mode="unloaded",
            what="unloaded",
            added_ttft_ms=0.5,
            added_itl_p50_ms=0.25,
            added_itl_p99_ms=0.75,
        ),
        measured(
            "master-whole",
            12.0,
            mode="paced",
            what="prompts",
            num_long=3,
            longest_lag_ms=7.5,
            itl_p99_ms=9.0,
        ),
    ]
    text = "\n".join(lines_of(rows_of(runs), ratios_of(runs)))
    assert "master-whole / relay, front per token, paced, 256 streams: 1.50 [1.50, 1.50]" in text
    for title in ("At a pace", "Requests of one token", "One stream, 20 ms", "20,000 tokens"):
        assert title in text
    assert "7.5" in text and "0.75" in text and "300.0" in text


# --- command line -----------------------------------------------------------------------------


class Ran:
    """What the command handed on, instead of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[FrontendOptions] = []
        self.error: BaseException | None = None
        monkeypatch.setattr(app, "run", self._run)

    def _run(self, options: FrontendOptions) -> int:
        self.given.append(options)
        if self.error is not None:
            raise self.error
        return 0

    def frontend(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["bench", "frontend", *arguments])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


def test_no_flag_is_the_default_and_every_flag_reaches(ran: Ran, tmp_path: Any) -> None:
    assert ran.frontend().exit_code == 0
    words = "--arms relay,master-whole --streams 2,8 --rate 500 --seconds 0.5 --repetitions 2"
    words += " --num-requests 9 --seed 4 --start-timeout 7 --json x.json"
    more = ["--vllm-command", "python -m x", "--log-dir", str(tmp_path), "--plot", str(tmp_path)]
    assert ran.frontend(*shlex.split(words), *more).exit_code == 0
    assert ran.given == [
        FrontendOptions(),
        FrontendOptions(
            arms=("master-whole", "relay"),
            streams=(2, 8),
            rate=500.0,
            seconds=0.5,
            repetitions=2,
            num_requests=9,
            seed=4,
            vllm_command=("python", "-m", "x"),
            start_timeout_s=7.0,
            json_path="x.json",
            plot_dir=tmp_path,
            log_dir=tmp_path,
        ),
    ]


@pytest.mark.parametrize(
    "words",
    [
        *("--arms best", "--arms ,", "--streams 0", "--streams x", "--streams 5000", "--streams ,"),
        *("--rate 0", "--rate nan", "--seconds -1", "--repetitions 0", "--num-requests 0"),
        *("--seed -1", "--start-timeout 0", "--json /no/such/folder/x.json", "--plot /dev/null/x"),
    ],
)
def test_a_bad_value_is_refused_before_anything_starts(ran: Ran, words: str) -> None:
    result = ran.frontend(*shlex.split(words))
    assert result.exit_code == 2 and result.stdout == ""
    assert words.split()[0] in result.stderr or "cannot write" in result.stderr
    assert ran.given == []


def test_what_cannot_start_is_one_line(ran: Ran) -> None:
    ran.error = StartError("a server did not start")
    result = ran.frontend()
    assert (result.exit_code, result.stderr) == (2, "tinfer: a server did not start\n")


def test_parsers_keep_one_order() -> None:
    assert parse_arms("vllm-1, relay,relay") == ("relay", "vllm-1")
    assert parse_streams("64,1,64") == (64, 1)


def test_the_help_has_every_arm() -> None:
    text = CliRunner().invoke(main, ["bench", "frontend", "--help"]).output
    assert all(kind in text for kind in KINDS)


def test_serve_takes_what_a_fake_engine_is_told() -> None:
    argv = server_of("master-whole", "paced", OPTIONS).argv
    told = dict(
        word.split("=")
        for flag, word in zip(argv, argv[1:], strict=False)
        if flag == "--fake-engine"
    )
    config = load({"engine": "fake", "fake_engine": {k: float(v) for k, v in told.items()}})
    assert config.fake_engine["decode_seq_s"] == pytest.approx(2 / OPTIONS.rate)
