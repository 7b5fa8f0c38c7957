"""From runs to what is reported: SLOs, arrays, figures, ratios, verdicts, and the text."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tinfer.bench.compare.bootstrap import draw
from tinfer.bench.compare.comparison import PointResult, compare_point, lines_of
from tinfer.bench.compare.limits import TPOT_FACTORS, TTFT_FACTOR, slos_of, unloaded_of
from tinfer.bench.compare.metrics import METRICS, PAPER_FORM, RECIPROCAL_FORM, figures_of
from tinfer.bench.compare.report import text, warnings
from tinfer.bench.compare.samples import Sample, covered_s, sample_of, work_of
from tinfer.bench.compare.steps import Point
from tinfer.bench.outcome import LoadRun, Outcome
from tinfer.bench.slo import Slo

POINT = Point("Mixed", 0.5)


def answer(
    name: str = "r0", sent_s: float = 0.0, ttft_s: float = 0.1, tpot_s: float = 0.01, num: int = 11
) -> Outcome:
    """A whole answer of `num` tokens."""
    first_s = sent_s + ttft_s
    return Outcome(
        request_id=name,
        due_s=sent_s,
        sent_s=sent_s,
        prompt_tokens=7,
        asked_tokens=num,
        chunk_s=[first_s + i * tpot_s for i in range(num)],
        end_s=first_s + num * tpot_s,
        output_tokens=num,
        has_usage=True,
        status=200,
    )


def run_of(*outcomes: Outcome, duration_s: float = 10.0) -> LoadRun:
    return LoadRun(outcomes=list(outcomes), duration_s=duration_s, cpu_s=0.1)


def sample(scale: float = 1.0, num: int = 20, seed: int = 0, duration_s: float = 10.0) -> Sample:
    """A run whose latencies are `scale` times those of another with the same seed."""
    rng = np.random.default_rng(seed)
    outcomes = [
        answer(f"r{i}", i / 2, scale * rng.uniform(0.1, 0.3), scale * rng.uniform(0.01, 0.03))
        for i in range(num)
    ]
    slos = {level: {"A": Slo(ttft=400.0, tpot=40.0)} for level in ("loose", "tight")}
    placed = {one.request_id: 0 for one in outcomes}
    return sample_of(
        run_of(*outcomes, duration_s=duration_s),
        {one.request_id: "A" for one in outcomes},
        slos,
        work_of(outcomes, placed, [(0,)]),
        server_cpu_s=2.0,
    )


def test_slos_are_multiples_of_the_median_alone() -> None:
    outcomes = [answer(f"r{i}", ttft_s=ttft_s) for i, ttft_s in enumerate((0.1, 0.2, 0.9))]
    outcomes += [answer("one", ttft_s=0.5, num=1)]
    failed = Outcome(request_id="bad", due_s=0, prompt_tokens=1, asked_tokens=1, error="no")
    tasks = {"r0": "A", "r1": "A", "r2": "A", "one": "B", "bad": "C"}
    unloaded = unloaded_of(tasks, [*outcomes, failed])
    assert sorted(unloaded) == ["A", "B"]
    assert unloaded["A"].ttft_s == pytest.approx(0.2)
    assert unloaded["A"].longest_e2el_s == pytest.approx(1.0)
    assert unloaded["B"].tpot_s is None
    slos = slos_of(unloaded)
    for level, factor in TPOT_FACTORS.items():
        bounds = slos[level]["A"].bounds()
        assert bounds["ttft"] == pytest.approx(TTFT_FACTOR * 200)
        assert bounds["tpot"] == pytest.approx(factor * 10)
        assert slos[level]["B"].bounds() == {"ttft": pytest.approx(TTFT_FACTOR * 500)}


def test_work_of_replicas_and_of_one_server_over_all_devices() -> None:
    outcomes = [answer("r0", 0.0), answer("r1", 1.0), answer("r2", 5.0)]
    replicas = work_of(outcomes, {"r0": 0, "r1": 1, "r2": 0}, [(0,), (1,)])
    assert [[round(end, 3) for _, end in one] for one in replicas] == [[0.2, 5.2], [1.2]]
    paper = work_of(outcomes, {"r0": 0, "r1": 0, "r2": 0}, [(0, 1)])
    assert len(paper) == 2 and paper[0] == paper[1] and len(paper[0]) == 3


def test_work_of_tinfers_workers_is_what_the_traces_say() -> None:
    split, whole = answer("r0", 1.0, ttft_s=0.5), answer("r1", 3.0)
    split.trace = {"prefill_worker": "p", "decode_worker": "d", "prefill_s": 0.2}
    whole.trace = {"prefill_worker": "d", "decode_worker": "d", "prefill_s": 9.0}
    by_worker = work_of([split, whole], {"r0": 0, "r1": 0}, [(0, 1)])
    rounded = [[(round(a, 3), round(b, 3)) for a, b in one] for one in by_worker]
    # A trace may begin before the sending by a clock's difference; work does not.
    assert rounded == [[(1.3, 1.5)], [(1.5, 1.6), (3.0, 3.2)]]


def test_work_that_no_trace_tells_of_counts_on_all_workers_and_adds_none() -> None:
    split, failed = answer("r0", 1.0, ttft_s=0.5), answer("r1", 4.0)
    split.trace = {"prefill_worker": "p", "decode_worker": "d", "prefill_s": 0.2}
    failed.error = "cut"
    by_worker = work_of([failed, split], {"r0": 0, "r1": 0}, [(0, 1, 2)])
    rounded = [sorted((round(a, 3), round(b, 3)) for a, b in one) for one in by_worker]
    assert sorted(rounded) == [[(1.3, 1.5), (4.0, 4.2)], [(1.5, 1.6), (4.0, 4.2)], [(4.0, 4.2)]]
    assert len(work_of([failed], {"r1": 0}, [(0, 1, 2)])) == 3


def test_resource_time_is_from_the_start_to_the_end_of_the_last_work_of_each_device() -> None:
    outcomes = [answer("r0", 1.0), answer("r1", 2.0), answer("r2", 9.0)]
    placed = {"r0": 0, "r1": 1, "r2": 0}
    slos = {level: {"A": Slo()} for level in TPOT_FACTORS}
    made = sample_of(
        run_of(*outcomes),
        dict.fromkeys(placed, "A"),
        slos,
        work_of(outcomes, placed, [(0,), (1,)]),
        0,
    )
    assert made.resource_s == pytest.approx(8.2 + 1.2)
    assert made.busy_s == pytest.approx(0.2 + 0.2 + 0.2)


def test_covered_time_is_that_of_the_union() -> None:
    assert covered_s([(0, 2), (1, 3), (5, 6), (5.2, 5.5)]) == pytest.approx(4.0)
    assert covered_s([]) == 0.0


def test_failed_requests_are_in_no_latency_and_are_not_good() -> None:
    bad = answer("r1")
    bad.error = "cut"
    slos = {level: {"A": Slo()} for level in TPOT_FACTORS}
    made = sample_of(run_of(answer("r0"), bad), {"r0": "A", "r1": "A"}, slos, [], 0)
    assert made.ok.tolist() == [True, False] and made.good["loose"].tolist() == [True, False]
    assert np.isnan(made.latency_s["ttft"]).tolist() == [False, True]
    assert made.output_tokens.tolist() == [11, 0] and set(made.itl_owner.tolist()) == {0}


def test_figures_are_those_of_all_repetitions_together() -> None:
    runs = [sample(seed=1), sample(seed=2)]
    figures = figures_of(runs, draw([20, 20], 10, seed=0), offered_rps=4.0)
    measured = {name: float(values[0]) for name, values in figures.items()}
    assert measured.keys() == METRICS.keys() - {PAPER_FORM}
    for name in ("ttft", "tpot", "e2el"):
        values_ms = 1000 * np.concatenate([one.latency_s[name] for one in runs])
        assert measured[f"mean_{name}_ms"] == pytest.approx(values_ms.mean())
        assert measured[f"median_{name}_ms"] == pytest.approx(np.median(values_ms))
        assert measured[f"p99_{name}_ms"] == pytest.approx(np.percentile(values_ms, 99))
    gaps_ms = 1000 * np.concatenate([one.itl_s for one in runs])
    assert measured["p99_itl_ms"] == pytest.approx(np.percentile(gaps_ms, 99))
    assert measured["request_throughput"] == pytest.approx(2.0)
    assert measured["output_throughput"] == pytest.approx(22.0)
    # All are good: of what was offered, whatever the end of the last answer makes of the duration.
    assert measured["goodput_loose"] == pytest.approx(4.0)
    resource_s = (runs[0].resource_s + runs[1].resource_s) / 2
    assert measured["resource_s"] == pytest.approx(resource_s)
    assert measured[RECIPROCAL_FORM] == pytest.approx(
        1000 / (measured["mean_e2el_ms"] * resource_s)
    )


def compared(scale: float, offered_rps: float = 2.0) -> PointResult:
    """A replica arm and a tinfer arm that takes `scale` times as long."""
    samples = {
        "replicas": [sample(seed=seed) for seed in range(3)],
        "tinfer-auto": [sample(scale, seed=seed) for seed in range(3)],
    }
    result = compare_point(POINT, offered_rps, samples, ["replicas"], 200, seed=0)
    assert result is not None
    return result


def test_an_arm_that_is_the_baseline_again_has_ratios_of_one() -> None:
    result = compared(1.0)
    for name, one in result.arms["tinfer-auto"].items():
        assert one.ratio is not None and one.verdict == "unclear", name
        assert (one.ratio.value, one.ratio.low, one.ratio.high) == (1.0, 1.0, 1.0)
    for one in result.arms["replicas"].values():
        assert one.ratio is None and one.verdict is None


def test_an_arm_that_takes_half_as_long() -> None:
    result = compared(0.5)
    ours = result.arms["tinfer-auto"]
    for name in ("mean_ttft_ms", "p99_itl_ms", "mean_e2el_ms"):
        assert ours[name].verdict == "better", name
        ratio = ours[name].ratio
        assert ratio is not None and ratio.value == pytest.approx(0.5)
        assert ratio.low == pytest.approx(0.5) == ratio.high
    resource, paper = ours["resource_s"].ratio, ours[PAPER_FORM].ratio
    assert resource is not None and paper is not None
    assert paper.value == pytest.approx(1.5 / resource.value)
    wins = [line.metric for line in lines_of([result], "better", ["tinfer-auto"])]
    assert "mean_ttft_ms" in wins and PAPER_FORM in wins
    assert lines_of([result], "worse", ["tinfer-auto"]) == []


def test_losses_are_told_first_and_the_worst_of_them_at_once() -> None:
    result = compared(3.0)
    losses = lines_of([result], "worse", ["tinfer-auto"])
    distances = [max(one.ratio.value, 1 / one.ratio.value) for one in losses[1:-2] if one.ratio]
    assert distances == sorted(distances, reverse=True) and len(distances) > 5
    # All lines but goodput follow from the same figures; perf/$ comes last.
    assert losses[0].metric.startswith("goodput")
    assert {one.metric for one in losses[-2:]} == {PAPER_FORM, RECIPROCAL_FORM}
    shown = list(text([result], losses, []))
    assert shown[1].startswith("Worse than the baseline") and "goodput" in shown[2]
    assert "Better than the baseline, with the whole interval: nothing" in shown


def test_the_better_replica_arm_is_the_baseline() -> None:
    samples = {
        "replicas": [sample(3.0)],
        "replicas-512": [sample(1.0)],
        "tinfer-auto": [sample(0.5)],
    }
    result = compare_point(POINT, 2.0, samples, ["replicas", "replicas-512"], 100, seed=0)
    assert result is not None and result.baseline == "replicas-512"


def test_of_equal_goodput_the_replica_arm_that_is_better_otherwise_is_the_baseline() -> None:
    fast, slow = sample(0.5), sample(1.0)
    few = {"loose": slow.good["loose"], "tight": np.arange(20) < 5}
    by_tight = {"a": msgspec.structs.replace(fast, good=few), "b": slow}
    for samples in (by_tight, {"a": slow, "b": fast}):
        assert slow.good["loose"].all() and fast.good["loose"].all()
        result = compare_point(POINT, 2.0, {n: [s] for n, s in samples.items()}, "ab", 100, seed=0)
        assert result is not None and result.baseline == "b"


def test_next_to_a_baseline_without_goodput_there_are_absolute_values() -> None:
    # The baseline's answers are too slow for both levels, but for a few of the second's.
    for num_good, has_ratio in ((1, False), (2, True)):
        base = sample(9.0, num=20)
        good = {level: np.arange(20) < num_good for level in TPOT_FACTORS}
        base = msgspec.structs.replace(base, good=good)
        samples = {"replicas": [base], "tinfer-auto": [sample(0.5, num=20)]}
        result = compare_point(POINT, 2.0, samples, ["replicas"], 100, seed=0)
        assert result is not None
        for name in ("goodput_loose", "goodput_tight"):
            one = result.arms["tinfer-auto"][name]
            assert one.value is not None and (one.ratio is not None) == has_ratio
        assert result.arms["tinfer-auto"]["mean_ttft_ms"].ratio is not None


def test_absolute_values_that_do_not_touch_are_a_verdict() -> None:
    samples = {"replicas": [sample(9.0, seed=s) for s in (0, 1)]}
    samples["tinfer-auto"] = [sample(0.5, seed=s) for s in (0, 1)]
    result = compare_point(POINT, 2.0, samples, ["replicas"], 100, seed=0)
    assert result is not None
    one = result.arms["tinfer-auto"]["goodput_tight"]
    assert one.ratio is None and one.verdict == "better"
    wins = lines_of([result], "better", ["tinfer-auto"])
    assert wins[0].metric.startswith("goodput") and wins[0].ratio is None
    assert any(" against 0" in line for line in text([result], [], wins))


def test_one_repetition_has_no_interval_for_what_is_one_value_per_run() -> None:
    samples = {"replicas": [sample(1.0)], "tinfer-auto": [sample(0.5, duration_s=5.0)]}
    result = compare_point(POINT, 2.0, samples, ["replicas"], 100, seed=0)
    assert result is not None
    one = result.arms["tinfer-auto"]["request_throughput"]
    assert one.ratio is not None and one.ratio.value == pytest.approx(2.0)
    assert (one.ratio.low, one.ratio.high, one.verdict) == (None, None, "unclear")
    assert result.arms["tinfer-auto"]["mean_ttft_ms"].verdict == "better"


def test_only_repetitions_that_all_arms_have_count() -> None:
    samples = {"replicas": [sample(seed=s) for s in range(3)], "tinfer-auto": [sample(seed=0)]}
    result = compare_point(POINT, 2.0, samples, ["replicas"], 100, seed=0)
    assert result is not None and result.num_repetitions == 1
    assert compare_point(POINT, 2.0, {**samples, "paper": []}, ["replicas"], 100, seed=0) is None


def test_warnings_of_all_runs_are_told_once() -> None:
    quiet = {
        "client_cpu_share": 0.1,
        "client_lag_p99_ms": 1.0,
        "failed": 0,
        "num_short_answers": 0,
    }
    run = {"figures": quiet, "idle_cpu_share": 0.0}
    assert list(warnings([run, run])) == []
    busy = {**run, "figures": {**quiet, "failed": 2}}
    worse = {**run, "figures": {**quiet, "failed": 13}, "idle_cpu_share": 0.3}
    told = list(warnings([run, busy, worse]))
    assert len(told) == 2 and told[0].startswith("in 2 of 3 runs") and "0.30 of a core" in told[1]
