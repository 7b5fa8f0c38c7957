"""`tinfer predictor eval`: no answer is known before it ends, figures are what their definitions
say, and the check that there may be no skill finds none."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from tinfer.cli import main
from tinfer.core.lengths import Lengths, bucket, certain
from tinfer.predict.asked import Asked, End
from tinfer.predict.features import features_of_tokens
from tinfer.predict.hashes import as_hex
from tinfer.sim.predictor_app import scores_of
from tinfer.sim.prequential import (
    HINTED,
    SHUFFLED,
    TenantMean,
    Told,
    Trial,
    play,
    shuffled,
    trials_of,
)
from tinfer.sim.scores import Score, kendall_tau, pinball, quantiles, score
from tinfer.workloads import LogRecord, Segment, write_log

MEDIANS = {"a": 20, "b": 90, "c": 400}


def record(number: int = 0, **changes: Any) -> LogRecord:
    given = {
        "request_id": f"r{number}",
        "arrival_s": float(number),
        "prompt_tokens": 50,
        "max_output_tokens": 2048,
        "output_tokens": 9,
        "finish_reason": "stop",
        **changes,
    }
    return LogRecord(**given)


def log_of(num: int, **changes: Any) -> list[LogRecord]:
    """Three tenants with lengths of their own; answers overlap with later arrivals."""
    rng = random.Random("log")
    records = []
    for number in range(num):
        tenant = rng.choice(sorted(MEDIANS))
        tokens = max(1, round(rng.lognormvariate(math.log(MEDIANS[tenant]), 0.3)))
        segments = (Segment(f"system {tenant}", 40), Segment(f"own {number}", 20))
        records.append(
            record(
                number,
                tenant=tenant,
                segments=segments,
                output_tokens=tokens,
                e2el_s=0.01 * tokens,
                **changes,
            )
        )
    return records


# --- trials ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "end", "tokens"),
    [
        ({}, End.STOP, 9),
        ({"finish_reason": "length", "max_output_tokens": 9}, End.LENGTH, 9),
        ({"finish_reason": "abort"}, End.ABORT, 9),
        ({"finish_reason": "stop", "error": "gone"}, End.ERROR, 9),
        ({"finish_reason": None}, End.STOP, 9),
        ({"finish_reason": None, "max_output_tokens": 9}, End.LENGTH, 9),
        ({"finish_reason": "tool_calls"}, End.STOP, 9),
    ],
)
def test_how_an_answer_ended(changes: dict[str, Any], end: End, tokens: int) -> None:
    (trial,) = trials_of([record(**changes)])
    assert (trial.end, trial.output_tokens) == (end, tokens)


def test_a_bound_in_place_of_the_logs() -> None:
    asked_exactly = record(finish_reason="length", output_tokens=30, max_output_tokens=30)
    for most, expected in ((100, (30, End.STOP)), (30, (30, End.STOP)), (20, (20, End.LENGTH))):
        (trial,) = trials_of([asked_exactly], most)
        assert (trial.output_tokens, trial.end) == expected
        assert trial.asked.max_output_tokens == most
    (failed,) = trials_of([record(finish_reason="error", output_tokens=30)], 20)
    assert (failed.output_tokens, failed.end) == (30, End.ERROR)


def test_what_a_predictor_is_shown_is_what_a_server_would_know() -> None:
    first, second, other = trials_of(log_of(3))
    for trial in (first, second, other):
        assert trial.asked.output_tokens is None
    (named,) = trials_of([record(tenant="t")])
    (again,) = trials_of([record(1, tenant="t", prompt_tokens=9)])
    assert named.asked.features == again.asked.features
    assert named.asked.features.head != 0
    (nobody,) = trials_of([record()])
    assert nobody.asked.features.head == 0


def test_of_a_servers_log_a_predictor_is_shown_the_hashes_of_the_prompt() -> None:
    features = features_of_tokens(bytes(4 * 50), "m")
    kept: dict[str, Any] = {
        "model": "m",
        "prompt_head": as_hex(features.head),
        "prompt_signature": features.signature,
        "segments": (Segment("other", 50),),
        "expected_output_tokens": 7,
    }
    (trial,) = trials_of([record(**kept)])
    assert trial.asked.features == features
    assert (trial.asked.expected_output_tokens, trial.asked.runs_to_bound) == (7, False)
    (odd,) = trials_of([record(**{**kept, "prompt_signature": b"x"})])
    assert (odd.asked.features.head, odd.asked.features.signature) == (features.head, b"")
    to_bound = record(runs_to_bound=True, finish_reason="length")
    assert trials_of([to_bound])[0].asked.runs_to_bound
    # Under another bound it is an answer that ended.
    assert not trials_of([to_bound], 4000)[0].asked.runs_to_bound


def test_hints_are_an_arm_of_their_own_where_there_are_any() -> None:
    plain = log_of(200)
    right = [replace(one, expected_output_tokens=one.output_tokens) for one in plain]
    assert HINTED not in scores_of(trials_of(plain))
    scores = scores_of(trials_of(right))
    assert scores[HINTED].mae_tokens < 0.5 * scores["online"].mae_tokens
    wrong = [replace(one, expected_output_tokens=1) for one in plain]
    scores = scores_of(trials_of(wrong), num_skipped=100)
    assert scores[HINTED].mae_tokens == pytest.approx(scores["online"].mae_tokens, rel=0.02)


class Diary:
    """Writes down what it is asked and told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def predict(self, asked: Asked) -> Lengths:
        self.lines.append(f"{asked.request_id}?")
        return certain(5)

    def observe(self, asked: Asked, output_tokens: int, end: End) -> None:
        self.lines.append(f"{asked.request_id}={output_tokens}")


def test_an_answer_is_known_when_it_has_ended_and_not_before() -> None:
    diary = Diary()
    records = [
        record(2, e2el_s=0.5, output_tokens=3),
        record(0, e2el_s=2.5, output_tokens=1),
        record(1, output_tokens=2, finish_reason="abort"),
        record(3, e2el_s=9.0),
    ]
    told = play(diary, trials_of(records))
    assert diary.lines == ["r0?", "r1?", "r1=2", "r2?", "r0=1", "r2=3", "r3?", "r3=9"]
    assert [one.lengths for one in told] == [certain(5)] * 4


def test_shuffling_moves_answers_and_keeps_bounds() -> None:
    records = [record(i, output_tokens=i + 1, max_output_tokens=10 + i % 5) for i in range(30)]
    records = [one for one in records if one.output_tokens <= one.max_output_tokens]
    before = trials_of(records)
    after = shuffled(before, seed=1)
    assert [one.asked for one in after] == [one.asked for one in before]
    assert [one.output_tokens for one in after] != [one.output_tokens for one in before]
    assert all(one.output_tokens <= one.asked.max_output_tokens for one in after)
    assert after == shuffled(before, seed=1) != shuffled(before, seed=2)


def test_the_mean_of_a_tenant() -> None:
    predictor = TenantMean()
    a, b = (one.asked for one in trials_of([record(tenant="a"), record(1, tenant="b")]))
    assert predictor.predict(a) == certain(2048)
    predictor.observe(a, 10, End.STOP)
    predictor.observe(a, 20, End.LENGTH)
    assert predictor.predict(a) == predictor.predict(b) == certain(15)
    predictor.observe(b, 90, End.STOP)
    assert (predictor.predict(a), predictor.predict(b)) == (certain(15), certain(90))


# --- scores ---------------------------------------------------------------------------------------


def scored(*pairs: tuple[Lengths, int], num_skipped: int = 0) -> Score:
    trials = [
        Trial(Asked(f"r{i}", 5, 1000), tokens, End.STOP, float(i), float(i))
        for i, (_, tokens) in enumerate(pairs)
    ]
    return score(trials, [Told(lengths, 2e-6) for lengths, _ in pairs], num_skipped)


def test_figures_by_hand() -> None:
    one = scored((certain(40), 60), (certain(120), 110), (certain(500), 450))
    # 40 and 60 differ at 50 alone, 120 and 110 nowhere, 500 and 450 at 50 and at 100.
    expected = {"50": 1 / 3, "100": 2 / 3, "200": 1.0, "400": 1.0}
    assert one.bucket_accuracy == pytest.approx(expected)
    assert one.kendall_tau == 1.0
    assert one.mae_tokens == pytest.approx((20 + 10 + 50) / 3)
    # 20 too few cost 20 times the rank; 10 and 50 too many cost that times the rest.
    assert one.pinball_tokens == pytest.approx((20 * 0.5 + 10 * 0.5 + 50 * 0.5) / 3)
    assert one.coverage_80 == 0.0
    assert one.width_80_tokens == 0.0
    assert one.predict_us == pytest.approx(2.0)


def test_the_first_are_learnt_from_and_not_scored() -> None:
    assert scored((certain(1), 900), (certain(5), 5), num_skipped=1).mae_tokens == 0.0
    with pytest.raises(ValueError, match="no answer"):
        scored((certain(1), 900), num_skipped=1)


def test_a_distribution_that_is_true_is_covered_as_it_says() -> None:
    uniform = Lengths(tuple(range(10, 1010, 10)))
    one = scored(*((uniform, tokens) for tokens in range(1, 1001)))
    for share, covered in one.coverage.items():
        assert covered == pytest.approx(float(share), abs=0.01)
    assert one.width_80_tokens == pytest.approx(800, rel=0.02)
    narrow = scored(*((bucket(490, 510), tokens) for tokens in range(1, 1001)))
    assert narrow.coverage_80 < 0.03


def test_quantiles_of_equally_likely_lengths() -> None:
    assert quantiles(Lengths((10, 20)), (0.1, 0.25, 0.5, 0.75, 0.9)).tolist() == [
        10,
        10,
        15,
        20,
        20,
    ]
    assert quantiles(certain(7)).tolist() == [7.0] * 5
    rows = np.array([[10.0, 10.0, 10.0, 10.0, 10.0]])
    assert pinball(rows, np.array([20.0])).tolist() == [[1.0, 2.5, 5.0, 7.5, 9.0]]
    assert pinball(rows, np.array([0.0]))[0] == pytest.approx([9.0, 7.5, 5.0, 2.5, 1.0])


def test_tau() -> None:
    up, down = np.arange(5.0), np.arange(5.0)[::-1]
    assert kendall_tau(up, up) == 1.0
    assert kendall_tau(up, down) == -1.0
    assert kendall_tau(np.ones(5), up) is None
    # Five of six pairs agree and one does not.
    assert kendall_tau(np.array([1.0, 2, 4, 3]), np.arange(4.0)) == pytest.approx(4 / 6)
    # One pair is a tie on one side: 5 / sqrt(5 * 6).
    assert kendall_tau(np.array([1.0, 1, 2, 3]), np.arange(4.0)) == pytest.approx(5 / 30**0.5)
    rng = np.random.default_rng(1)
    many = rng.random(7000)
    assert kendall_tau(many, many) == 1.0
    assert abs(kendall_tau(many, rng.random(7000)) or 0.0) < 0.03


def test_skill_is_found_where_it_is_and_none_where_there_is_none() -> None:
    scores = scores_of(trials_of(log_of(400)), num_skipped=100)
    online, none = scores["online"], scores[SHUFFLED]
    assert online.kendall_tau is not None and none.kendall_tau is not None
    assert online.kendall_tau > 0.6
    assert abs(none.kendall_tau) < 0.1
    for other in ("max-tokens", "prior", "prompt-length", "tenant-mean", SHUFFLED):
        assert online.pinball_tokens < 0.8 * scores[other].pinball_tokens, other
    assert 0.7 < online.coverage_80 < 0.92
    assert online.bucket_accuracy["100"] > 0.6


# --- the command ----------------------------------------------------------------------------------


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["predictor", "eval", *words])


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    write_log(path, log_of(60))
    return path


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The words, and a folder with JSON and picture: drawn here, because matplotlib keeps its font
    file open from the first picture on."""
    folder = tmp_path_factory.mktemp("eval")
    write_log(folder / "run.jsonl", log_of(60))
    where = ("--json", str(folder / "r.json"), "--plot", str(folder / "new"))
    done = invoke("--from", str(folder / "run.jsonl"), *where)
    assert done.exit_code == 0, done.output
    return done.stdout, folder


def test_the_report(reported: tuple[str, Path]) -> None:
    text, folder = reported
    assert "run.jsonl: 60 requests (60 stop)" in text
    result = msgspec.json.decode((folder / "r.json").read_bytes())
    names = ["online", "max-tokens", "prior", "prompt-length", "tenant-mean", "shuffled"]
    assert list(result["predictors"]) == names
    for name, one in result["predictors"].items():
        assert one.keys() == set(Score.__struct_fields__)
        assert f"\n{name} " in text
    assert result["num_by_end"] == {"stop": 60, "length": 0, "abort": 0, "error": 0}
    assert (folder / "new" / "predictors.png").stat().st_size > 5000


def test_json_alone(log: Path) -> None:
    done = invoke("--from", str(log), "--json", "-", "--skip", "10", "--seed", "3")
    settings = msgspec.json.decode(done.stdout)["settings"]
    assert settings == {"log": "run.jsonl", "max_tokens": None, "skip": 10, "seed": 3}


def test_a_log_of_the_load_generator_says_so_itself(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    write_log(
        path,
        [
            record(i, finish_reason="length", output_tokens=5 + i, max_output_tokens=5 + i)
            for i in range(20)
        ],
    )
    assert "--max-tokens" in invoke("--from", str(path)).stdout
    done = invoke("--from", str(path), "--max-tokens", "100", "--json", "-")
    assert msgspec.json.decode(done.stdout)["num_by_end"]["stop"] == 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no answer was served"),
        (b"{}\n", "line 1 of the request log"),
        (b"\xff\xfe\n", "line 1 of the request log"),
    ],
)
def test_a_log_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    done = invoke("--from", str(path))
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_but_failures_cannot_be_scored(tmp_path: Path) -> None:
    lines = io.BytesIO()
    write_log(lines, [record(finish_reason="error", error="x"), record(1, output_tokens=0)])
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines.getvalue())
    assert "none can be scored" in invoke("--from", str(path)).stderr


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--from", "/no/such/file"),
        ("--skip", "-1"),
        ("--max-tokens", "0"),
        ("--seed", "x"),
        ("--json", "/"),
        ("--plot", "/dev/null"),
        ("--skip", "60"),
    ],
)
def test_bad_options(log: Path, words: tuple[str, ...]) -> None:
    given = words if "--from" in words or not words else ("--from", str(log), *words)
    done = invoke(*given)
    assert done.exit_code == 2
    assert done.stdout == ""
