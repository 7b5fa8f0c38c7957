"""How a simulation is reported: the baseline of ratios, numbers, counts over time, intervals."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinfer.config import ServeConfig
from tinfer.core.costs import CostModel
from tinfer.sim import report
from tinfer.sim.arms import ReplicasArm, baseline_arm, num_devices_of, replicas_arm, run_arm
from tinfer.sim.baselines import unloaded_slos
from tinfer.sim.boxes import measured_box, paper_vllm_of, preset_box, taxed, workers_of
from tinfer.sim.paired import Estimate, mean_of, ratio_of
from tinfer.sim.plots import counts_at, spans_of
from tinfer.sim.results import RequestResult
from tinfer.sim.spec import EngineSpec, SimRequest

BOX = preset_box("paper")


def requests(num: int = 12) -> list[SimRequest]:
    return [
        SimRequest(
            request_id=f"r{i}",
            arrival_s=i / 2,
            prompt_tokens=100 * (1 + i % 3),
            output_tokens=5 + i,
            max_output_tokens=50,
            task="even" if i % 2 else "odd",
        )
        for i in range(num)
    ]


def small_result() -> report.Result:
    arms = [replicas_arm(BOX, 2, ServeConfig()), replicas_arm(BOX, 2, ServeConfig(), 64)]
    runs = [run_arm(arm, requests()) for arm in arms]
    slos = unloaded_slos(BOX.replica, requests())
    return report.result_of({"requests": "few", "box": "b"}, arms, runs, slos)


def test_a_result_has_figures_ratios_and_classes() -> None:
    result = small_result()
    arms = result["arms"]
    assert result["baseline"] in arms
    (other,) = arms.keys() - {result["baseline"]}
    base = arms[result["baseline"]]["figures"]
    for name in ("mean_ttft_ms", "mean_e2el_ms", "resource_s"):
        assert arms[other]["ratios"][name] == pytest.approx(
            arms[other]["figures"][name] / base[name]
        )
    classes = arms[other]["classes"]
    assert {task: one["num_requests"] for task, one in classes.items()} == {"even": 6, "odd": 6}
    assert all(0 <= one["good_loose"] <= 1 for one in classes.values())
    assert result["slos_ms"]["tight"]["even"]["ttft_ms"] > 0
    assert result["offered_rate"] == pytest.approx(12 / 5.5)


def test_what_is_no_number_is_null_in_the_file() -> None:
    arm = replicas_arm(BOX, 1, ServeConfig())
    one_token = [msgspec.structs.replace(requests(1)[0], output_tokens=1)]
    result = report.result_of({"requests": "", "box": ""}, [arm], [run_arm(arm, one_token)], {})
    read = msgspec.json.decode(report.encoded(result))
    assert read["arms"]["replicas"]["figures"]["mean_tpot_ms"] is None
    assert read["baseline"] is None and read["offered_rate"] is None
    assert "TPOT mean (ms)" not in "\n".join(report.text(result))


def test_the_table_names_the_baseline_and_shows_ratios() -> None:
    result = small_result()
    lines = list(report.text(result))
    head = next(line for line in lines if "(baseline)" in line)
    assert f"{result['baseline']} (baseline)" in head
    assert sum(" x" in line for line in lines) >= 10
    assert any(line.startswith("even, 6 requests") for line in lines)


def test_the_baseline_is_the_replicas_with_more_good_answers() -> None:
    arms = [replicas_arm(BOX, 1, ServeConfig()), replicas_arm(BOX, 1, ServeConfig(), 64)]
    worse, better = {"goodput_loose": 1.0}, {"goodput_loose": 2.0}
    both = {"mean_e2el_ms": 5.0}
    assert report.baseline_of(arms, [worse | both, better | both]) == 1
    assert report.baseline_of(arms, [better | both, worse | both]) == 0
    assert report.baseline_of(arms, [{"mean_e2el_ms": 4.0}, {"mean_e2el_ms": 3.0}]) == 1
    vllm = ReplicasArm(name="paper", engine=BOX.replica, num_replicas=1)
    assert report.baseline_of([vllm], [worse | both]) is None
    assert report.baseline_of([vllm, vllm], [worse | both] * 2) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1234.5, "1234"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.01234, "0.0123"),
        (math.nan, "-"),
        (None, "-"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert report.number(value) == shown


# --- boxes and arms ------------------------------------------------------------------------------


def test_the_papers_vllm_elsewhere_is_one_engine_at_ideal_scaling() -> None:
    box = preset_box("cpu-52m")
    engine = paper_vllm_of(box, 4)
    costs = box.replica.costs
    assert engine.costs.step_s(100, 5, 1000) == pytest.approx(costs.step_s(100, 5, 1000) / 4)
    assert engine.num_blocks == 4 * box.replica.num_blocks and engine.num_devices == 4
    assert engine.max_num_seqs == 16 and not engine.chunked_prefill
    assert paper_vllm_of(BOX, 2) == BOX.paper_vllm


def test_devices_of_arms() -> None:
    config = ServeConfig()
    counts = [
        num_devices_of(baseline_arm(kind, BOX, 1, 1, config))
        for kind in ("replicas", "replicas-128", "hybrid", "paper")
    ]
    assert counts == [4, 4, 4, 2]


@pytest.mark.parametrize("name", ["paper", "cpu-52m", "gpu-estimate"])
@pytest.mark.parametrize(
    ("config", "num_seqs"),
    [
        (ServeConfig(), (256, 256)),
        (ServeConfig(max_num_seqs=64, enable_prefix_caching=False), (64, 64)),
        (ServeConfig(max_num_seqs=1024), (1024, 512)),
    ],
)
def test_replicas_have_tinfers_seats_and_its_prefix_caching(
    name: str, config: ServeConfig, num_seqs: tuple[int, int]
) -> None:
    box = preset_box(name)
    (worker,) = workers_of(box, 0, 1, config)
    plain, small = (baseline_arm(kind, box, 1, 1, config) for kind in ("replicas", "replicas-512"))
    assert isinstance(plain, ReplicasArm) and isinstance(small, ReplicasArm)
    assert (plain.engine.max_num_seqs, small.engine.max_num_seqs) == num_seqs
    for engine in (plain.engine, small.engine):
        assert engine.prefix_caching == worker.engine.prefix_caching == config.enable_prefix_caching
        assert (engine.victim, engine.prefill_order) == ("newest", "fcfs")
    assert worker.engine.max_num_seqs == config.max_num_seqs


def test_a_taxed_engine_takes_longer_for_everything_but_hand_offs() -> None:
    engine = EngineSpec(num_blocks=10, costs=CostModel(prefill_context_s=1e-9))
    slow = taxed(engine, 1.5).costs
    assert slow.step_s(7, 3, 90, 11) == pytest.approx(1.5 * engine.costs.step_s(7, 3, 90, 11))
    assert slow.handoff_total_s(100) == engine.costs.handoff_total_s(100)


def test_a_measured_box() -> None:
    box = measured_box("mine", CostModel(source="here"), 100, 32, 2, 640)
    assert (box.num_devices, box.chunk_tokens, box.source) == (2, 640, "here")
    assert box.decode.capacity.num_blocks == 100 and box.decode.block_tokens == 32


# --- who computed what ---------------------------------------------------------------------------


def answered(**changed: object) -> RequestResult:
    plain = RequestResult(
        request_id="a",
        task="",
        arrival_s=0.0,
        prompt_tokens=1,
        output_tokens=2,
        first_token_s=2.0,
        last_token_s=5.0,
        started_s=1.0,
        handoff_s=None,
        route="whole",
        workers=("d0",),
        cached_tokens=0,
        num_preemptions=0,
        error=None,
    )
    return msgspec.structs.replace(plain, **changed)


def test_spans_of_whole_and_split_requests() -> None:
    split = answered(route="split", workers=("p0", "d0"), handoff_s=0.5)
    spans = spans_of([answered(), split, answered(first_token_s=None, last_token_s=None)])
    assert list(spans) == ["d0", "p0"]
    assert spans["d0"] == {
        "prefill": [(1.0, 2.0)],
        "hand-off": [(2.0, 2.5)],
        "decode": [(2.0, 5.0), (2.5, 5.0)],
    }
    assert spans["p0"]["prefill"] == [(1.0, 2.0)]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted), max_size=8))
def test_counts_over_time(pairs: list[list[float]]) -> None:
    spans = [(low, high) for low, high in pairs]
    times_s = np.linspace(0.0, 10.0, 21)
    wanted = [sum(low <= at < high for low, high in spans) for at in times_s]
    assert counts_at(spans, times_s).tolist() == wanted


# --- intervals -----------------------------------------------------------------------------------


def test_students_interval_of_a_mean() -> None:
    found = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    # 2.776 x sqrt(2.5) / sqrt(5)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 1.0370, 4.9630), abs=1e-4)
    assert mean_of([7.0]) == Estimate(7.0)
    many = mean_of([0.0, 1.0] * 50)
    assert many.high == pytest.approx(0.5 + 1.960 * math.sqrt(0.25 * 100 / 99) / 10)
    with pytest.raises(ValueError):
        mean_of([])


def test_ratios_are_paired() -> None:
    # Each draw has the same ratio, however much the draws differ.
    found = ratio_of([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio_of([1.0], [4.0]) == Estimate(0.25)
    assert ratio_of([1.0, 0.0], [1.0, 1.0]) is None
    assert ratio_of([math.nan], [1.0]) is None
    assert ratio_of([], []) is None
