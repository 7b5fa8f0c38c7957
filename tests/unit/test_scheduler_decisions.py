"""benchmarks/scheduler_decisions.py on a small box: it fills, ends, and names what it timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import scheduler_decisions as benchmark

COMMON = {"Arrived", "Stepped", "Stepped, progress", "Tick", "WorkerFinished", "decision"}
OF_SPLIT = {"Prefilled", "Pulled", "LeaseEnded"}
OF_ROUTE = {"auto": {"FirstToken"}, "split": OF_SPLIT}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "NUM_RUNNING", 30)
    monkeypatch.setattr(benchmark, "NUM_WAITING", 20)
    monkeypatch.setattr(benchmark, "NUM_BLOCKS", {"auto": 1000, "split": 2000})
    monkeypatch.setattr(benchmark, "MOST_ARRIVALS", 1000)


@pytest.mark.usefixtures("small")
def test_every_kind_of_event_is_timed_on_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "decisions.json"
    monkeypatch.setattr(sys, "argv", ["decisions", "--rounds", "40", "--json", str(out)])
    benchmark.main()
    report = json.loads(out.read_text())
    assert (report["num_waiting"], report["num_running"], report["num_workers"]) == (20, 30, 8)
    for route, result in report["results"].items():
        assert COMMON | OF_ROUTE[route] <= set(result["events"])
        assert result["num_blocks_per_worker"] == benchmark.NUM_BLOCKS[route]
        assert result["num_running_at_end"] >= 29
        for figures in result["events"].values():
            assert figures["num"] > 0
            assert figures["min_us"] <= figures["median_us"] <= figures["p99_us"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("route", ["auto", "split"])
def test_a_filled_box_holds_what_it_says(route: str) -> None:
    box = benchmark.Box(route, seed=1)
    benchmark.fill(box)
    assert len(box.decoding) == 30 and box.num_waiting >= 20


@pytest.mark.usefixtures("small")
def test_workers_too_small_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "NUM_BLOCKS", {"split": 300})
    with pytest.raises(RuntimeError, match="of 30 requests run .* the workers are too small"):
        benchmark.fill(benchmark.Box("split", seed=1))
