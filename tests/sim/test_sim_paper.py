"""The paper's experiments of benchmarks/sim_paper.py: requests, arms, and what is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from benchmarks import sim_paper
from tinfer.config import ServeConfig
from tinfer.core.lengths import HEAVY_TOKENS
from tinfer.core.policies.registry import DECODE_CHOICES
from tinfer.master.scheduling import scheduler_config
from tinfer.sim import paper
from tinfer.sim.arms import ReplicasArm, TinferArm
from tinfer.sim.boxes import preset_box, workers_of
from tinfer.sim.paper import Setting

SETTING = Setting()


@pytest.fixture(scope="module", autouse=True)
def no_choice_is_left_registered() -> Iterator[None]:
    """Figure 19 makes choices known to the scheduler of its process, which here is all tests'."""
    before = dict(DECODE_CHOICES)
    yield
    DECODE_CHOICES.clear()
    DECODE_CHOICES.update(before)


def test_what_is_scored() -> None:
    scored = {(name, metric) for name, one in paper.HEADLINE.items() for metric in one.scored}
    assert len(scored) == 13
    assert {name for name, metric in scored if metric == "ttft"} == {"LPLD", "LPHD", "Mixed"}
    assert {name for name, one in paper.HEADLINE.items() if one.points == 5} == {"LPHD", "Mixed"}


def test_requests_come_at_once_and_do_not_tell_their_length() -> None:
    found = paper.requests_of("Mixed", 128, 3)
    assert {one.arrival_s for one in found} == {0.0}
    assert {one.max_output_tokens for one in found} == {paper.MAX_TOKENS}
    assert len({one.output_tokens for one in found}) > 50
    assert found == paper.requests_of("Mixed", 128, 3) != paper.requests_of("Mixed", 128, 4)


@pytest.mark.parametrize("num_decode", paper.NUMS_OF_DECODE)
def test_figure_19_has_32_heavy_decodes(num_decode: int) -> None:
    found = paper.dispatch_requests(num_decode, 1)
    heavy = Counter(one.output_tokens > HEAVY_TOKENS for one in found)
    assert heavy == {True: 32, False: 32 * (num_decode - 1)}
    assert len({one.request_id for one in found}) == len(found)


def test_the_papers_modes() -> None:
    vllm, tetri, replicas, auto, *_ = paper.headline_arms(SETTING, 0, scheduler_config)
    assert isinstance(vllm, ReplicasArm) and isinstance(replicas, ReplicasArm)
    assert isinstance(tetri, TinferArm) and isinstance(auto, TinferArm)
    assert (vllm.num_replicas, vllm.engine.max_num_seqs, vllm.engine.num_devices) == (1, 16, 2)
    assert (replicas.num_replicas, replicas.engine.num_devices) == (2, 2)
    prefill, decode = (
        one.engine for one in sorted(tetri.workers, key=lambda w: w.role.value)[::-1]
    )
    assert prefill.costs.base_s == pytest.approx(1.1 * decode.costs.base_s)
    assert tetri.scheduler.route == "split" and tetri.scheduler.prefill_sched_batch == 16
    assert auto.predictor == tetri.predictor


def test_ours_computes_as_the_workers_of_tinfer_serve() -> None:
    _, tetri, _, auto, *_ = paper.headline_arms(SETTING, 0, scheduler_config)
    srpt = next(one for one in paper.order_arms(SETTING, 0) if one.name == "srpt")
    assert isinstance(tetri, TinferArm) and isinstance(auto, TinferArm)
    assert isinstance(srpt, TinferArm)
    served = workers_of(preset_box("paper"), 1, 1, ServeConfig())
    assert [one.engine.pads_chunks for one in tetri.workers] == [True, False]
    for mine, theirs, one in zip(auto.workers, tetri.workers, served, strict=True):
        assert mine.engine.prefill_order == one.engine.prefill_order == "srpt"
        assert mine.engine.victim == one.engine.victim == "least-progress"
        assert not mine.engine.pads_chunks
        # All else is the paper's.
        pads = theirs.engine.pads_chunks
        plain = replace(mine.engine, prefill_order="fcfs", victim="newest", pads_chunks=pads)
        assert plain == theirs.engine
    assert {one.engine.prefill_order for one in srpt.workers} == {"srpt"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One draw of everything, and its picture, since matplotlib keeps its font file open."""
    tasks = sim_paper.tasks_of([0], SETTING)
    report = sim_paper.report_of([(task, sim_paper.simulated(task)) for task in tasks])
    path: Path = sim_paper.draw(report, tmp_path_factory.mktemp("paper"))
    assert path.stat().st_size > 5000
    return report


def test_the_table(found: dict[str, Any]) -> None:
    assert [cell["workload"] for cell in found["cells"]] == [
        w for w in paper.HEADLINE for _ in "123"
    ]
    for cell in found["cells"]:
        assert cell["inside"] is None or cell["inside"] == (abs(cell["distance"]) <= cell["points"])
    # What nobody doubts of the paper: the prompts of LPHD and Mixed wait far less.
    by_cell = {(cell["workload"], cell["metric"]): cell for cell in found["cells"]}
    assert by_cell["LPHD", "ttft"]["simulated"]["value"] < -90
    assert by_cell["Mixed", "ttft"]["simulated"]["value"] < -60
    assert by_cell["HPLD", "resource"]["simulated"]["value"] > 0


def test_the_report_lists_what_is_outside_first(found: dict[str, Any]) -> None:
    lines = list(sim_paper.text(found))
    outside = [cell for cell in found["cells"] if cell["inside"] is False]
    assert lines[0] == f"scored cells within their points: {13 - len(outside)} of 13"
    assert all(line.startswith("  outside: ") for line in lines[1 : 1 + len(outside)])
    assert sum("OUTSIDE" in line for line in lines) == len(outside)
    for words in ("figure 16", "figure 18", "figure 19"):
        assert any(line.startswith(words) for line in lines)


def test_sorting_more_prompts_at_a_time_shortens_the_wait(found: dict[str, Any]) -> None:
    arms = found["arms"][sim_paper.ORDERS]["Mixed"]
    wait_s = {arm: figures["wait_s"]["value"] for arm, figures in arms.items()}
    assert wait_s["sjf-128"] < wait_s["sjf-16"] < wait_s["fcfs-16"] < wait_s["ljf-16"]
    assert wait_s["fcfs-16"] == wait_s["fcfs-128"]


def test_peak_never_overcommits(found: dict[str, Any]) -> None:
    for arms in found["arms"][sim_paper.ADMISSIONS].values():
        assert arms["peak/oracle"]["num_preemptions"]["value"] == 0
        assert arms["greedy/oracle"]["num_preemptions"]["value"] > 0


def test_imbalance_puts_all_heavy_decodes_on_one_worker(found: dict[str, Any]) -> None:
    for num in paper.NUMS_OF_DECODE:
        arms = found["arms"][sim_paper.CHOICES][str(num)]
        assert arms[paper.IMBALANCE]["most_heavy"]["value"] == 32
        assert arms[paper.IMBALANCE]["light_beside"]["value"] == 0
        assert arms["projected"]["most_heavy"]["value"] < 32


def test_a_report_is_json(found: dict[str, Any]) -> None:
    assert msgspec.json.decode(msgspec.json.encode(found))["cells"]
