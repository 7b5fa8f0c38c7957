"""What the pictures of a comparison show, as numbers, and what its result file holds."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

import tinfer.bench.compare.app as app
from tests.unit.test_compare_results import POINT, compared, sample
from tinfer.bench.compare.app import compared as compared_points
from tinfer.bench.compare.app import dry_run_lines, judged_of, result_of, run
from tinfer.bench.compare.arms import Arm, default_arms
from tinfer.bench.compare.charts import goodput_curves, latency_curves, ratio_bars
from tinfer.bench.compare.limits import Unloaded
from tinfer.bench.compare.options import CompareOptions, with_devices
from tinfer.bench.compare.recorded import FullLoad, Recorded, Run
from tinfer.bench.compare.steps import Step
from tinfer.bench.compare.vllm_command import with_metadata
from tinfer.errors import StartError

ARMS = [Arm("replicas", "replicas"), Arm("ours", "tinfer-auto")]


def run_of(arm: str, repetition: int, scale: float) -> Run:
    return Run(
        step=Step(POINT, repetition, arm),
        rate_rps=2.0,
        sample=sample(scale, seed=repetition),
        figures={"completed": 20},
        records=None,
        idle_cpu_share=0.0,
    )


def test_goodput_over_load_has_a_point_per_load_with_its_interval() -> None:
    low, high = compared(1.0), msgspec.structs.replace(compared(2.0), load=0.9, offered_rps=4.0)
    curves = goodput_curves([high, low], "Mixed", "goodput_tight")
    curve, below, above = curves["tinfer-auto"]
    assert curve.x == [2.0, 4.0] and curve.y[0] > curve.y[1]
    assert len(below) == len(above) == 2 and min(below + above) >= 0
    assert goodput_curves([low], "LPHD", "goodput_tight") == {}


def test_latencies_are_those_of_all_repetitions() -> None:
    runs = [run_of("replicas", 0, 1.0), run_of("replicas", 1, 1.0), run_of("ours", 0, 1.0)]
    theirs, ours = sorted(latency_curves(runs, "ttft"), key=lambda curve: -len(curve.x))
    assert (theirs.label, len(theirs.x)) == ("replicas", 40) and len(ours.x) == 20
    assert theirs.y[-1] == 1.0 and theirs.x[0] >= 100.0
    assert len(latency_curves(runs, "itl")[0].x) == 200


def test_ratios_have_a_row_per_metric_and_none_for_the_baseline() -> None:
    words, bars = ratio_bars(compared(0.5))
    assert {bar.arm for bar in bars} == {"tinfer-auto"}
    by_word = {words[bar.row]: bar for bar in bars}
    ttft = by_word["TTFT mean"]
    assert ttft.value == pytest.approx(0.5) and ttft.low <= ttft.value <= ttft.high


def test_an_interval_down_to_nothing_is_cut_and_no_loss_is_left_out() -> None:
    words, bars = ratio_bars(compared(2.6))
    (tight,) = [bar for bar in bars if words[bar.row] == "goodput, tight SLO"]
    assert 0 < tight.low < tight.value < 0.2 and tight.low >= tight.value / 100


def recorded(ended_early: str | None = None) -> Recorded:
    one = Unloaded(num_requests=1, ttft_s=0.1, tpot_s=None, mean_e2el_s=1.0, longest_e2el_s=1.0)
    return Recorded(
        unloaded={"LPLD": one},
        full_load={"Mixed": FullLoad(rate_rps=4.0, arm=None, probes=[])},
        runs=[run_of(arm, i, s) for i in (0, 1) for arm, s in (("replicas", 1.0), ("ours", 3.0))],
        ended_early=ended_early,
    )


def test_the_result_file_says_all_it_takes_to_read_it() -> None:
    options = with_devices(
        CompareOptions(workloads=("Mixed",), loads=(0.5, 0.9), num_resamples=100), [0, 1]
    )
    found = recorded("interrupted")
    points = compared_points(options, ARMS, found)
    # Of the second point nothing was measured.
    assert [(point.workload, point.load) for point in points] == [("Mixed", 0.5)]
    result = msgspec.json.decode(
        msgspec.json.encode(result_of(options, ARMS, found, points, "today"))
    )
    assert (result["date"], result["ended_early"]) == ("today", "interrupted")
    assert [len(arm["servers"]) for arm in result["arms"]] == [2, 1]
    assert result["settings"]["num_resamples"] == 100 and result["hardware"]["cores_used"] == [0, 1]
    assert len(result["runs"]) == 4 and result["runs"][0]["figures"] == {"completed": 20}
    assert {line["arm"] for line in result["losses"]} == {"ours"} and result["wins"] == []
    ratio = result["points"][0]["arms"]["ours"]["mean_e2el_ms"]["ratio"]
    assert ratio["value"] == pytest.approx(3.0)


def test_every_key_of_the_result_is_explained() -> None:
    options = with_devices(CompareOptions(workloads=("Mixed",)), [0, 1])
    rows = [line for line in str(app.__doc__).splitlines() if line.startswith("| `")]
    explained = [key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(explained) == sorted(result_of(options, ARMS, Recorded(), [], "today"))


def test_a_result_that_cannot_be_written_is_shown_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = CompareOptions(workloads=("Mixed",), loads=(0.5,), json_path=str(tmp_path))
    found = recorded()
    points = compared_points(replace(options, num_resamples=100), ARMS, found)
    result = result_of(options, ARMS, found, points, "today")
    with pytest.raises(IsADirectoryError):
        app._write(options, ARMS, result, points, found)
    assert "Worse than the baseline, with the whole interval: " in capsys.readouterr().out


def test_a_baseline_by_name() -> None:
    options = CompareOptions(workloads=("Mixed",), loads=(0.5,), num_resamples=100, baseline="ours")
    (point,) = compared_points(options, ARMS, recorded())
    assert point.baseline == "ours"
    with pytest.raises(StartError, match="--baseline nobody is none of"):
        run(CompareOptions(baseline="nobody"), default_arms())


def test_a_dry_run_says_what_is_known_of_its_time() -> None:
    options = with_devices(
        CompareOptions(workloads=("Mixed", "burst"), loads=(0.5,), full_load={"Mixed": 2.0}), [0, 1]
    )
    lines = dry_run_lines(options, ARMS)
    told = "\n".join(lines)
    assert "20 runs of 100 requests" in told
    assert "Mixed at 0.5: arrivals take 16.7 min at a full load of 2 req/s" in told
    assert "burst at 0.5: arrivals take 2000 s divided by its full load" in told
    assert "OMP_NUM_THREADS=1" in told and "[cores 1]" in told and "in all" not in told


def test_the_metadata_of_vllm_is_in_a_folder_of_its_own(tmp_path: Path) -> None:
    environment = with_metadata({"PYTHONPATH": "/mine"}, tmp_path)
    assert environment["PYTHONPATH"] == f"{tmp_path}:/mine"
    (entry,) = tmp_path.iterdir()
    assert "Name: vllm\n" in (entry / "METADATA").read_text()


def test_told_are_losses_of_tinfer_or_where_it_is_not_there_of_all() -> None:
    assert judged_of(ARMS) == ["ours"]
    assert judged_of([Arm("a", "replicas"), Arm("b", "replicas")]) == ["a", "b"]
