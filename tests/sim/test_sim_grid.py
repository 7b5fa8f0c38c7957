"""The grid of benchmarks/sim_grid.py: what runs of a cell say, resuming, and a small grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import sim_grid
from tests.unit.tune_box import tuning
from tinfer.config import ServeConfig
from tinfer.core.costs import CostModel
from tinfer.master.scheduling import scheduler_config
from tinfer.sim import grid
from tinfer.sim.boxes import preset_box
from tinfer.sim.grid import Cell, Figures
from tinfer.sim.paired import Estimate
from tinfer.tune import store

CELL = Cell("cpu-52m", 2, "Mixed", 0.7)
OFFERED_RPS = 10.0


def draw(**arms: Mapping[str, Any]) -> Figures:
    """One draw in which all arms are alike, but what is given."""
    plain = {
        "mean_e2el_ms": 100.0,
        "request_throughput": 9.0,
        "goodput_loose": 9.5,
        "goodput_tight": 5.0,
        "num_failed": 0,
    }
    return {arm: {**plain, **arms.get(arm.replace("-", "_"), {})} for arm in grid.ARMS}


def verdict(*draws: Figures, cell: Cell = CELL) -> grid.Verdict:
    return grid.verdict_of(cell, OFFERED_RPS, draws)


def test_arms_that_are_alike_are_not_worse() -> None:
    slow = {arm: {**figures, "mean_e2el_ms": 300.0} for arm, figures in draw().items()}
    found = verdict(draw(), slow)
    assert not found.is_worse and not found.binds
    assert found.e2el == Estimate(1.0, 1.0, 1.0) and grid.distance(found) == 1.0
    assert found.good_share == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("auto", "worse"),
    [
        ({"mean_e2el_ms": 101.9}, False),
        ({"mean_e2el_ms": 102.1}, True),
        ({"request_throughput": 8.83}, False),
        ({"request_throughput": 8.8}, True),
        ({"mean_e2el_ms": 50.0, "request_throughput": 8.0}, True),
    ],
)
def test_worse_is_beyond_the_margin(auto: dict[str, float], worse: bool) -> None:
    draws = [draw(auto=auto), draw(auto=auto)]
    assert verdict(*draws).is_worse is worse


def test_only_a_whole_interval_beyond_the_margin_is_worse() -> None:
    wide = [draw(auto={"mean_e2el_ms": ms}) for ms in (90.0, 130.0, 110.0)]
    assert not verdict(*wide).is_worse
    narrow = [draw(auto={"mean_e2el_ms": ms}) for ms in (109.0, 110.0, 111.0)]
    assert verdict(*narrow).is_worse
    # One draw has no interval, and is taken at its word.
    assert verdict(wide[1]).is_worse and not verdict(wide[0]).is_worse


def test_the_best_other_arm_is_picked_per_figure() -> None:
    found = verdict(
        draw(split={"mean_e2el_ms": 60.0}, replicas_512={"request_throughput": 12.0}),
        draw(split={"mean_e2el_ms": 60.0}, replicas_512={"request_throughput": 12.0}),
    )
    assert (found.best_e2el, found.best_throughput) == ("split", "replicas-512")
    assert found.e2el is not None and found.e2el.value == pytest.approx(100 / 60)
    assert grid.distance(found) == pytest.approx(100 / 60)


def test_where_interference_binds_the_gain_is_to_the_better_replicas() -> None:
    plain = {"replicas": {"goodput_loose": 4.0}, "replicas_512": {"goodput_loose": 5.0}}
    found = verdict(draw(**plain, auto={"goodput_loose": 8.0}), draw(**plain))
    assert found.binds and found.replicas == "replicas-512"
    assert found.good_share == pytest.approx(0.5)
    assert found.goodput is not None
    assert found.goodput.value == pytest.approx(math.sqrt(8.0 / 5.0 * 9.5 / 5.0))
    light = msgspec.structs.replace(CELL, load=0.3)
    assert not verdict(draw(**plain), cell=light).binds
    none = {name: {"goodput_loose": 0.0} for name in ("replicas", "replicas_512")}
    nothing = verdict(draw(**none))
    assert nothing.goodput is None and grid.gains([nothing, found]) == [found, nothing]


def test_an_arm_that_gets_stuck() -> None:
    stuck = draw(auto={})
    stuck["auto"] = {"error": "never answered"}
    found = verdict(draw(), stuck)
    assert found.is_worse and found.errors == {"auto": "never answered"}
    assert grid.distance(found) == math.inf
    stuck = draw()
    stuck["replicas"] = {"error": "never answered"}
    assert not verdict(stuck).is_worse and verdict(stuck).replicas == "replicas-512"
    failed = verdict(draw(auto={"num_failed": 3}), draw(auto={"num_failed": 2}))
    assert failed.failed == {"auto": 5}


def test_failing_requests_is_worse_whatever_the_latency_of_the_others() -> None:
    fast = {"num_failed": 3, "mean_e2el_ms": 10.0}
    assert verdict(draw(auto=fast), draw(auto=fast)).is_worse
    nothing = {"num_failed": 60, "mean_e2el_ms": None, "request_throughput": None}
    found = verdict(draw(auto=nothing))
    assert found.is_worse and found.e2el is None and found.throughput is None
    everybody = {arm.replace("-", "_"): fast for arm in grid.ARMS}
    assert not verdict(draw(**everybody)).is_worse


def test_an_arm_without_a_figure_is_not_the_best_one() -> None:
    broken = {"mean_e2el_ms": None, "request_throughput": 0.0, "num_failed": 60}
    found = verdict(*[draw(replicas=broken, auto={"request_throughput": 5.0})] * 2)
    assert found.best_throughput != "replicas" and found.best_e2el != "replicas"
    assert found.is_worse


def test_no_good_answer_at_all_is_the_smallest_gain() -> None:
    none = {"goodput_loose": 0.0}
    few = {"replicas": {"goodput_loose": 4.0}, "replicas_512": {"goodput_loose": 1.0}}
    found = verdict(draw(auto=none, **few), draw(auto={"goodput_loose": 2.0}, **few))
    assert found.goodput == Estimate(0.25)
    lost = verdict(draw(auto=none, **few))
    assert lost.goodput == Estimate(0.0)
    won = verdict(draw(**few))
    boundless = verdict(draw(replicas=none, replicas_512=none))
    assert grid.gains([won, boundless, lost]) == [lost, won, boundless]
    lines = list(sim_grid.text([won, lost], [], everything=False))
    assert any(line.endswith("times the better replicas' in 1") for line in lines)


def test_arms_share_the_devices() -> None:
    arms = grid.arms_of(preset_box("paper"), 8, ServeConfig(), scheduler_config)
    assert [arm.name for arm in arms] == list(grid.ARMS)
    assert {grid_devices(arm) for arm in arms} == {16}


def grid_devices(arm: Any) -> int:
    from tinfer.sim.arms import num_devices_of

    return num_devices_of(arm)


def test_the_chunk_at_which_a_prefill_saturates() -> None:
    flat = CostModel(base_s=1e-6, prefill_token_s=1e-3)
    assert grid.saturating_chunk(flat) == min(grid.CHUNKS)
    steep = CostModel(base_s=10.0, prefill_token_s=1e-6)
    assert grid.saturating_chunk(steep) == max(grid.CHUNKS)
    assert grid.saturating_chunk(CostModel(base_s=0.012, prefill_token_s=1e-3)) == 256


# --- the script ----------------------------------------------------------------------------------


def test_auto_keeps_decodes_and_prompts_apart_in_bursts() -> None:
    """With prompts spread over both workers as they come, answers took 1.7 times as long."""
    box = preset_box("cpu-52m")
    options = sim_grid.Options(num_requests=800, probe_requests=300)
    full = sim_grid.full_load(
        sim_grid.FullTask(box=box, num_workers=2, workload="burst", options=options)
    )
    task = sim_grid.cell_task(box, full, 0.75, 0, options)
    arms = tuple(arm for arm in task.arms if arm.name in ("auto", "hybrid", "replicas"))
    figures = grid.simulated(msgspec.structs.replace(task, arms=arms))
    e2el_ms = {name: of["mean_e2el_ms"] for name, of in figures.items()}
    assert e2el_ms["auto"] < 1.2 * e2el_ms["hybrid"] < e2el_ms["replicas"]


SMALL = "--boxes cpu-52m --workers 2 --workloads Mixed,burst --loads 0.5,0.95 --jobs 1"
SMALL += " --num-requests 60 --probe-requests 80 --seeds 2"


def run(folder: Path, *words: str) -> dict[str, Any]:
    out = folder / "grid.json"
    given = [*SMALL.split(), "--runs", str(folder / "runs.jsonl"), "--json", str(out), *words]
    sim_grid.main(given)
    found: dict[str, Any] = msgspec.json.decode(out.read_bytes())
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small grid with its pictures; a fixture because matplotlib keeps its font file open."""
    folder = tmp_path_factory.mktemp("grid")
    run(folder, "--plot", str(folder / "plots"))
    return folder


def test_a_small_grid(ran: Path) -> None:
    found = msgspec.json.decode((ran / "grid.json").read_bytes())
    assert len(found["full_loads"]) == 2 and len(found["cells"]) == 4
    rates = {one["workload"]: one["rate_rps"] for one in found["full_loads"]}
    for cell in found["cells"]:
        where = cell["cell"]
        assert cell["offered_rps"] == pytest.approx(where["load"] * rates[where["workload"]])
        assert cell["num_draws"] == 2 and not cell["errors"] and not cell["failed"]
        assert cell["e2el"]["low"] <= cell["e2el"]["value"] <= cell["e2el"]["high"]
    names = {path.name for path in (ran / "plots").iterdir()}
    assert names == {"sim_grid-cpu-52m-e2el.png", "sim_grid-cpu-52m-goodput.png"}


def test_what_is_there_is_not_computed_again(
    ran: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = (ran / "runs.jsonl").read_bytes()
    whole = msgspec.json.decode((ran / "grid.json").read_bytes())
    # The last line was torn when the grid was killed: only it is missing.
    (tmp_path / "runs.jsonl").write_bytes(runs[:-20])
    computed: list[Cell] = []
    simulated = grid.simulated

    def counted(task: grid.CellTask) -> Figures:
        computed.append(task.cell)
        return simulated(task)

    monkeypatch.setattr(grid, "simulated", counted)
    again = run(tmp_path)
    assert len(computed) == 1
    assert again["cells"] == whole["cells"]
    assert (tmp_path / "runs.jsonl").read_bytes() == runs


def test_ctrl_c_reports_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (ran / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_bytes(b"".join(lines[:5]))

    def interrupted(task: grid.CellTask) -> Figures:
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "simulated", interrupted)
    assert len(run(tmp_path)["cells"]) == 2
    assert "2 cells" in capsys.readouterr().out


def test_runs_of_other_options_are_refused(ran: Path) -> None:
    with pytest.raises(SystemExit, match="other options"):
        run(ran, "--num-requests", "61")


def test_a_report_alone_changes_no_file(ran: Path, tmp_path: Path) -> None:
    torn = (ran / "runs.jsonl").read_bytes()[:-5]
    (tmp_path / "runs.jsonl").write_bytes(torn)
    found = run(tmp_path, "--report", "--num-requests", "61")
    assert (tmp_path / "runs.jsonl").read_bytes() == torn
    assert len(found["cells"]) == 4 and found["options"]["num_requests"] == 60


def test_a_measured_box_has_the_name_given_to_it(tmp_path: Path) -> None:
    path = store.save(tuning(), tmp_path)
    boxes = sim_grid._boxes(f"mine={path},paper")
    assert list(boxes) == ["mine", "paper"]
    assert boxes["mine"].name == "mine" and boxes["mine"].decode.costs == tuning().costs


def test_the_report_lists_losses_first(capsys: pytest.CaptureFixture[str]) -> None:
    worse = verdict(*[draw(auto={"mean_e2el_ms": 150.0})] * 2)
    good = verdict(draw(replicas={"goodput_loose": 2.0}, replicas_512={"goodput_loose": 1.0}))
    lines = list(sim_grid.text([good, worse], [], everything=True))
    assert lines[0] == "2 cells; auto is worse than the best other arm in 1"
    assert "x1.500" in lines[2]
    assert any("interference binds in 1 cells" in line for line in lines)
