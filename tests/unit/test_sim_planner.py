"""`tinfer plan`: the search, which configurations there are, the line that is recommended, and what
is left of an interrupted one."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import tinfer.master.app
from tinfer.cli import main
from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master.scheduling import scheduler_config
from tinfer.sim import arms, plan_app, planner
from tinfer.sim.arms import Arm, ReplicasArm, TinferArm
from tinfer.sim.boxes import Box, measured_box, preset_box
from tinfer.sim.parallel import done_in_parallel
from tinfer.sim.plan_app import PlanOptions
from tinfer.sim.planner import Candidate, Found, Ranked, Task
from tinfer.sim.results import SimRun, Slo
from tinfer.sim.sources import Source
from tinfer.sim.spec import SimRequest
from tinfer.sim.world import SimulationError

PAPER = preset_box("paper")
CPU = preset_box("cpu-52m")
SOURCE = Source(workload="Mixed", num_requests=30)


@given(st.floats(1e-2, 1e4), st.floats(0.1, 10.0))
def test_the_search_finds_the_highest_rate_that_passes(limit: float, first: float) -> None:
    found = planner.highest_rate(first, lambda rate: rate <= limit)
    if found is None:
        assert limit < planner.LEAST_SHARE * 2 * first
    else:
        assert found <= limit <= found * planner.TOLERANCE or found >= first * 2**10


def test_a_search_gives_up() -> None:
    rates: list[float] = []

    def never(rate_rps: float) -> bool:
        rates.append(rate_rps)
        return False

    assert planner.highest_rate(8.0, never) is None
    assert rates[0] == 8.0 and len(rates) < planner.MAX_PROBES
    rates.clear()
    assert planner.highest_rate(8.0, lambda rate: not never(rate)) is not None
    assert len(rates) == planner.MAX_PROBES


def candidates(boxes: Sequence[Box], num_gpus: int, **swept: tuple[str, ...]) -> list[Candidate]:
    return planner.candidates(boxes, num_gpus, ServeConfig(), swept, scheduler_config)


def test_all_mixes_of_workers_under_all_swept_values() -> None:
    found = candidates([PAPER], 8, route=("auto", "split"), decode_admission=("peak", "greedy"))
    ours = [one.config for one in found if one.config is not None]
    shapes = {(c.route, c.decode_admission, c.prefill, c.decode) for c in ours}
    assert shapes == {
        (route, admission, num, 4 - num)
        for route in ("auto", "split")
        for admission in ("peak", "greedy")
        for num in (1, 2, 3)
    }
    assert len(shapes) == len(ours)
    assert {config.tensor_parallel_size for config in ours} == {2}
    assert {one.num_devices for one in found} == {8}
    plain = [one.arm for one in found if one.config is None]
    assert [(arm.name, getattr(arm, "num_replicas", None)) for arm in plain] == [
        ("replicas", 4),
        ("replicas-512", 4),
    ]


def test_whole_has_one_kind_of_worker() -> None:
    found = candidates([CPU], 3, route=("whole",))
    configs = [one.config for one in found if one.config is not None]
    assert [(c.prefill, c.decode) for c in configs] == [(0, 3)]


def test_one_worker_alone_computes_everything_whole() -> None:
    found = candidates([PAPER], 2, route=("auto", "split"))
    (config,) = [one.config for one in found if one.config is not None]
    assert (config.route, config.prefill, config.decode) == ("whole", 0, 1)


def test_gpus_that_are_left_over_are_not_counted() -> None:
    assert {one.num_devices for one in candidates([PAPER], 5, route=("split",))} == {4}
    with pytest.raises(StartError, match="2 GPUs per worker"):
        candidates([PAPER], 1)


def test_replicas_that_would_be_the_same_are_one() -> None:
    small = measured_box("small", CPU.decode.costs, 100, 16, 1, 512)
    engine = msgspec.structs.replace(small.replica, max_num_batched_tokens=512)
    small = msgspec.structs.replace(small, replica=engine)
    plain = [one.arm.name for one in candidates([small], 2) if one.config is None]
    assert plain == ["replicas"]


def test_several_boxes_are_searched_side_by_side() -> None:
    one = measured_box("one", CPU.decode.costs, 4096, 16, 1, 512)
    two = measured_box("two", CPU.decode.costs, 8192, 16, 2, 512)
    found = candidates([one, two], 4, route=("split",))
    sizes = [c.config.tensor_parallel_size for c in found if c.config is not None]
    assert sizes == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"no_such": "1"}, "--no-such"),
        ({"route": "both"}, "route"),
        ({"max_num_seqs": "0"}, "--max-num-seqs"),
        ({"itl_slack": "x"}, "--itl-slack"),
    ],
)
def test_bad_values_of_a_sweep(words: dict[str, str], told: str) -> None:
    with pytest.raises(StartError, match=told):
        planner.configured(ServeConfig(), words)


def test_the_recommended_line_is_a_command_that_means_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[ServeConfig] = []

    def run(config: ServeConfig) -> int:
        ran.append(config)
        return 0

    monkeypatch.setattr(tinfer.master.app, "run", run)
    words = {"route": "split", "prefill": 2, "decode": 1, "flip": "reactive"}
    words |= {"itl_slack": "3", "overflow_risk": "0.12345678", "prefill_ageing": "1.25e-7"}
    words |= {"enable_prefix_caching": "false", "max_num_batched_tokens": "1024"}
    config = planner.configured(ServeConfig(model="m", max_num_seqs=64), words)
    line = planner.serve_line(msgspec.structs.replace(config, model=None))
    assert line.startswith("tinfer serve MODEL ") and " --itl-slack 3 " in line
    result = CliRunner().invoke(main, ["serve", "m", *line.split()[3:]])
    assert result.exit_code == 0, result.output
    assert ran == [config]
    assert planner.serve_line(ServeConfig(seed=5)) == "tinfer serve MODEL"


@pytest.mark.parametrize(
    ("words", "slo"),
    [
        (("loose",), "loose"),
        (("tight",), "tight"),
        (("ttft:200", "tpot:50"), Slo(ttft_s=0.2, tpot_s=0.05)),
        (("e2el:9000",), Slo(e2el_s=9.0)),
    ],
)
def test_service_levels(words: tuple[str, ...], slo: Slo | str) -> None:
    assert planner.parse_slo(words) == slo


@pytest.mark.parametrize(
    "words", [(), ("loose", "tight"), ("itl:5",), ("ttft:x",), ("ttft:0",), ("ttft:inf",)]
)
def test_bad_service_levels(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        planner.parse_slo(words)


# --- searches and their ranking ------------------------------------------------------------------


def options(**changed: Any) -> PlanOptions:
    plain = PlanOptions(
        source=SOURCE,
        boxes=(PAPER,),
        num_gpus=4,
        swept={"route": ("auto", "split")},
        num_jobs=1,
    )
    return msgspec.structs.replace(plain, **changed)


def task(**changed: Any) -> Task:
    return plan_app.tasks_of(options(**changed), scheduler_config)[0]


def test_a_found_rate_reaches_the_target_and_a_higher_one_does_not() -> None:
    one = task(slo="tight", share=0.8)
    found = planner.search(one)
    assert found.rate_rps is not None and found.share is not None
    assert found.share >= 0.8
    assert found.figures["mean_ttft_ms"] > 0
    beyond = planner.probed(one, found.rate_rps * planner.TOLERANCE)
    assert planner.good_share(beyond, one.goal.slos) < 0.8
    # At that rate the very same runs come out again.
    again = planner.probed(one, found.rate_rps)
    assert planner.good_share(again, one.goal.slos) == found.share


def test_bounds_that_nothing_meets() -> None:
    one = task(slo=Slo(ttft_s=1e-6))
    assert planner.search(one).rate_rps is None


def test_draws_are_taken_together() -> None:
    one = task(num_draws=3)
    runs = planner.probed(one, 1.0)
    assert len(runs) == 3
    assert len({run.requests[0].request_id for run in runs}) == 3


def test_a_class_may_be_missing_in_the_first_draw() -> None:
    source = Source(workload="Mixed", num_requests=4)
    one = task(source=source, num_draws=3)
    classes = [{r.task for r in run.requests} for run in planner.probed(one, 1.0)]
    assert one.goal.slos.keys() == set.union(*classes) != classes[0]
    assert planner.search(one).rate_rps is not None


def test_a_rate_that_nothing_bounds_is_none_to_recommend(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    asked = options(slo=Slo(e2el_s=900.0), json_path=str(path))
    assert plan_app.run(asked, scheduler_config) == 0
    found = msgspec.json.decode(path.read_bytes())
    assert not any(one["is_enclosed"] for one in found["candidates"])
    e2el_ms = [one["figures"]["mean_e2el_ms"] for one in found["candidates"]]
    assert e2el_ms == sorted(e2el_ms)
    assert found["margin_next"] is None and found["margin_replicas"] is None
    out = capsys.readouterr().out
    assert "no rate is too high" in out and "recommended, for up to" not in out


def test_a_configuration_that_gets_stuck_does_not_end_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_arm(arm: Arm, requests: Sequence[SimRequest], seed: int) -> SimRun:
        if isinstance(arm, TinferArm) and arm.scheduler.route == "split":
            raise SimulationError("3 requests are never answered")
        return arms.run_arm(arm, requests, seed)

    monkeypatch.setattr(planner, "run_arm", run_arm)
    assert plan_app.run(options(), scheduler_config) == 0
    out = capsys.readouterr().out
    assert "--route split" not in out.partition("recommended")[2]
    assert out.count("3 requests are never answered") == 1


def ranked(
    rate_rps: float | None,
    config: ServeConfig | None,
    e2el_ms: float = 1.0,
    is_enclosed: bool = True,
) -> Ranked:
    arm = ReplicasArm(name="replicas", engine=PAPER.replica, num_replicas=1)
    found = Found(
        rate_rps=rate_rps,
        share=1.0,
        figures={"mean_e2el_ms": e2el_ms},
        num_probes=1,
        is_enclosed=is_enclosed,
    )
    candidate = Candidate(arm=arm, config=config, box="b", num_devices=2)
    return Ranked(candidate=candidate, found=found)


def test_ranking_and_margins() -> None:
    plain, none = ranked(2.0, None), ranked(None, ServeConfig())
    slow, fast = ranked(3.0, ServeConfig(), 9.0), ranked(3.0, ServeConfig(route="split"), 4.0)
    order = planner.ranked([none, plain, slow, fast])
    assert order == [fast, slow, plain, none]
    assert planner.best_of(order, plain=True) is plain
    assert planner.best_of(order, plain=False) is fast
    assert planner.margin(fast, plain) == 1.5
    assert planner.margin(fast, none) is None and planner.margin(None, plain) is None
    boundless = ranked(1.0, ServeConfig(), is_enclosed=False)
    assert planner.ranked([plain, boundless]) == [boundless, plain]
    assert planner.margin(boundless, plain) is None and planner.margin(plain, boundless) is None


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Made here, because matplotlib keeps its font file open from the first picture on."""
    folder = tmp_path_factory.mktemp("plan")
    asked = options(json_path=str(folder / "plan.json"), plot_dir=folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert plan_app.run(asked, scheduler_config) == 0
    return folder, out.getvalue()


def test_a_plan(planned: tuple[Path, str]) -> None:
    folder, out = planned
    found = msgspec.json.decode((folder / "plan.json").read_bytes())
    best = found["candidates"][found["recommended"]]
    rates = [one["rate_rps"] or 0.0 for one in found["candidates"]]
    assert rates == sorted(rates, reverse=True) and len(rates) == found["num_planned"] == 4
    assert best["serve"] in out and "recommended" in out
    plain = found["candidates"][found["replicas"]]
    assert plain["serve"] is None
    assert found["margin_replicas"] == pytest.approx(best["rate_rps"] / plain["rate_rps"])
    assert not found["interrupted"]
    assert (folder / "plan.png").stat().st_size > 5000


def test_a_plan_that_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_app.run(options(slo=Slo(ttft_s=1e-6)), scheduler_config) == 1
    assert "no configuration of tinfer" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Task] = []

    def search(one: Task) -> Found:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(one)
        return Found(rate_rps=float(len(done)), share=0.9, figures={}, num_probes=1)

    monkeypatch.setattr(planner, "search", search)
    path = tmp_path / "plan.json"
    assert plan_app.run(options(json_path=str(path)), scheduler_config) == 130
    found = msgspec.json.decode(path.read_bytes())
    assert found["interrupted"] and len(found["candidates"]) == 3
    assert "interrupted: 3 of 4 looked at" in capsys.readouterr().out


def test_the_same_policies_as_the_server() -> None:
    (one,) = (c for c in candidates([PAPER], 4, route=("split",)) if c.config is not None)
    assert isinstance(one.arm, TinferArm) and one.config is not None
    assert one.arm.scheduler == scheduler_config(one.config, PAPER.decode.costs)


# --- in parallel ---------------------------------------------------------------------------------

NUMBERS = [float(number) for number in range(7)]


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_every_task_is_done_once(num_jobs: int) -> None:
    done = dict(done_in_parallel(math.sqrt, NUMBERS, num_jobs))
    assert done == {place: math.sqrt(number) for place, number in enumerate(NUMBERS)}


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_an_error_ends_it_and_no_process_stays(num_jobs: int) -> None:
    with pytest.raises(ValueError):
        dict(done_in_parallel(math.sqrt, [1.0, -1.0, 4.0], num_jobs))


def test_nothing_to_do() -> None:
    assert dict(done_in_parallel(math.sqrt, [], 2)) == {}
