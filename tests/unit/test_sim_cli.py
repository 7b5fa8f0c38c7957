"""`tinfer simulate` and `tinfer plan`: the policies are serve's own options, every option reaches
the simulation, mistakes end with code 2, and equal options give equal bytes."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from tests.unit.tune_box import tuning
from tinfer.cli import main, sim_options
from tinfer.config import ServeConfig
from tinfer.core.costs import CostModel
from tinfer.errors import StartError
from tinfer.master.scheduling import predictor_of, scheduler_config
from tinfer.sim import app, plan_app
from tinfer.sim.app import SimulateOptions
from tinfer.sim.arms import HybridArm, ReplicasArm, SchedulerOf, TinferArm
from tinfer.sim.boxes import preset_box
from tinfer.sim.plan_app import PlanOptions
from tinfer.sim.planner import SWEPT
from tinfer.sim.results import Slo
from tinfer.sim.sources import Source
from tinfer.tune import store
from tinfer.workloads import LogRecord, write_log

DEFAULT = ServeConfig(prefill=None, decode=None)
# What the simulated engines and boxes take from the options; the rest is the scheduler's.
OF_ENGINES = {"chunk_size", "prefill", "decode", "max_num_seqs", "max_num_batched_tokens"}
OF_ENGINES |= {"enable_prefix_caching"}


class Ran:
    """What the commands handed on, instead of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.simulated: list[SimulateOptions] = []
        self.planned: list[PlanOptions] = []
        self.error: BaseException | None = None
        self.code = 0
        monkeypatch.setattr(app, "run", self._simulate)
        monkeypatch.setattr(plan_app, "run", self._plan)

    def _simulate(self, options: SimulateOptions, scheduler_of: SchedulerOf) -> int:
        assert scheduler_of is scheduler_config
        self.simulated.append(options)
        return self._end()

    def _plan(self, options: PlanOptions, scheduler_of: SchedulerOf) -> int:
        assert scheduler_of is scheduler_config
        self.planned.append(options)
        return self._end()

    def _end(self) -> int:
        if self.error is not None:
            raise self.error
        return self.code


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def read_fields() -> set[str]:
    """The options that the scheduler's configuration and the predictor follow from."""
    seen = set()

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            seen.add(name)
            return getattr(ServeConfig(predictor="noisy-oracle"), name)

    config = typing.cast(ServeConfig, Recorder())
    scheduler_config(config, CostModel())
    predictor_of(config)
    return seen


def test_every_option_that_decides_is_there_and_no_other() -> None:
    assert (
        set(sim_options.policy_names())
        == (read_fields() - {"seed", "max_request_restarts", "slo_s"}) | OF_ENGINES
    )
    assert sim_options.NOT_SIMULATED <= set(ServeConfig.__struct_fields__)


def other_value(name: str) -> Any:
    """A value that is not the option's default."""
    hint = typing.get_type_hints(ServeConfig)[name]
    default = getattr(ServeConfig(), name)
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)[-1] if name != "flip" else "watchdog"
    if hint is bool:
        return not default
    if hint is float:
        return default / 2
    if name == "chunk_size":
        return "384"
    return 3 if int in (hint, *typing.get_args(hint)) else 1.5


def flags_of(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


@pytest.mark.parametrize("name", sim_options.policy_names())
def test_serve_options_reach_the_simulation(ran: Ran, name: str) -> None:
    value = other_value(name)
    result = invoke("simulate", *flags_of(name, value))
    assert result.exit_code == 0, result.output
    assert ran.simulated[0].config == replace(DEFAULT, **{name: value}) != DEFAULT


def test_no_flag_simulates_the_mixed_workload_on_the_cpu_box(ran: Ran) -> None:
    assert invoke("simulate").exit_code == 0
    source = Source(workload="Mixed", num_requests=1000)
    assert ran.simulated == [SimulateOptions(source=source, box=preset_box("cpu-52m"))]


def test_every_other_option_of_simulate(ran: Ran, tmp_path: Path) -> None:
    words = "--workload burst --request-rate 2 --num-prompts 7 --seed 3 --burstiness 0.5"
    words += " --length-scale 0.25 --max-prompt-tokens 9 --max-output-tokens 8 --max-tokens 99"
    words += " --workload-option cv=4 --preset paper --baseline paper,hybrid,paper"
    words += " --split-from 64 --predictor-tax 1.1 --noise 0.1 --json - --save-detailed"
    result = invoke("simulate", *words.split(), "--plot", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert ran.simulated == [
        SimulateOptions(
            source=Source(
                workload="burst",
                num_requests=7,
                rate_rps=2.0,
                seed=3,
                burstiness=0.5,
                length_scale=0.25,
                max_prompt_tokens=9,
                max_output_tokens=8,
                options={"cv": 4.0},
            ),
            box=preset_box("paper"),
            config=ServeConfig(seed=3),
            baselines=("paper", "hybrid"),
            split_from_tokens=64,
            max_tokens=99,
            predictor_tax=1.1,
            noise=0.1,
            json_path="-",
            save_detailed=True,
            plot_dir=tmp_path,
        )
    ]


def test_no_flag_plans_for_the_loose_level(ran: Ran) -> None:
    assert invoke("plan", "--gpus", "4").exit_code == 0
    source = Source(workload="Mixed", num_requests=1000)
    box = preset_box("cpu-52m")
    assert ran.planned == [PlanOptions(source=source, boxes=(box,), num_gpus=4, swept=dict(SWEPT))]


def test_options_of_plan(ran: Ran, tmp_path: Path) -> None:
    words = "plan --gpus 8 --slo ttft:500 tpot:50 --target 0.8 --route split --flip reactive"
    words += " --sweep decode-admission=peak,greedy --num-draws 2 --jobs 3 --json x.json"
    words += f" --plot {tmp_path} --preset paper --preset gpu-estimate"
    result = invoke(*words.split())
    assert result.exit_code == 0, result.output
    (options,) = ran.planned
    assert options.slo == Slo(ttft_s=0.5, tpot_s=0.05) and options.share == 0.8
    assert options.config == ServeConfig(route="split", flip="reactive")
    # An option that is given is not swept.
    assert options.swept == {
        "max_num_batched_tokens": ("512", "2048"),
        "decode_admission": ("peak", "greedy"),
    }
    assert [box.num_devices for box in options.boxes] == [2, 1]
    assert (options.num_draws, options.num_jobs) == (2, 3)
    assert (options.json_path, options.plot_dir) == ("x.json", tmp_path)


def test_what_was_measured_is_a_box(ran: Ran, tmp_path: Path) -> None:
    measured = tuning()
    path = store.save(measured, tmp_path)
    assert invoke("simulate", "--tuned", str(path)).exit_code == 0
    box = ran.simulated[0].box
    assert box.decode.costs == box.replica.costs == measured.costs
    assert box.decode.num_blocks == measured.kv.num_blocks
    assert box.decode.block_tokens == measured.kv.block_tokens
    assert box.num_devices == measured.identity.tensor_parallel_size
    assert invoke("plan", "--gpus", "4", "--tuned", str(path)).exit_code == 0
    chunks = ran.planned[0].swept["max_num_batched_tokens"]
    assert set(chunks) == {"512", "2048", str(max(256, measured.chunk.chunk_tokens))}


@pytest.mark.parametrize(
    ("words", "step_tokens"),
    [
        ("", 640),
        ("--chunk-size auto", 640),
        ("--chunk-size 384", 384),
        ("--max-num-batched-tokens 700", 700),
        ("--max-num-seqs 900", 900),  # a step holds a token of every sequence
    ],
)
def test_workers_of_a_measured_box_have_its_chunk_unless_options_name_one(
    ran: Ran, tmp_path: Path, words: str, step_tokens: int
) -> None:
    measured = tuning()
    measured = replace(measured, chunk=replace(measured.chunk, chunk_tokens=640))
    given = ["--tuned", str(store.save(measured, tmp_path)), *words.split()]
    assert invoke("simulate", *given, "--baseline", "hybrid,replicas").exit_code == 0
    tinfer, hybrid, replicas = app.arms_of(ran.simulated[0], scheduler_config)
    assert isinstance(tinfer, TinferArm) and isinstance(hybrid, HybridArm)
    found = {one.engine.max_num_batched_tokens for one in (*tinfer.workers, *hybrid.workers)}
    assert found == {step_tokens}
    # A plain replica knows of no tuning.
    assert isinstance(replicas, ReplicasArm) and replicas.engine.max_num_batched_tokens == 2048
    # With only one candidate for the chunk, a plan has the same workers.
    sweep = ["--sweep", "route=split", "--gpus", "2"]
    sweep += [] if "tokens" in words or "384" in words else ["--sweep", "chunk-size=auto"]
    assert invoke("plan", *given, *sweep, *words.split()).exit_code == 0
    (task,) = [
        one
        for one in plan_app.tasks_of(ran.planned[0], scheduler_config)
        if one.candidate.config is not None
    ]
    assert isinstance(task.candidate.arm, TinferArm)
    assert task.candidate.arm.workers == tinfer.workers


def test_the_result_says_which_chunk_was_simulated(tmp_path: Path) -> None:
    measured = tuning()
    path = store.save(measured, tmp_path)
    words = ["simulate", "--num-requests", "3", "--tuned", str(path), "--json", "-"]
    found = msgspec.json.decode(invoke(*words).stdout)
    assert found["settings"]["config"]["chunk_size"] == str(measured.chunk.chunk_tokens)


@pytest.mark.parametrize("words", ["--chunk-size 384", "--sweep chunk-size=auto,384"])
def test_a_chunk_size_that_is_asked_for_is_not_overruled(ran: Ran, words: str) -> None:
    assert invoke("plan", "--gpus", "2", *words.split()).exit_code == 0
    assert "max_num_batched_tokens" not in ran.planned[0].swept


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("simulate --preset none", "no preset"),
        ("simulate --workload-option cv", "NAME=NUMBER"),
        ("simulate --prefill 0 --decode 0", "--prefill and --decode"),
        ("simulate --route split --decode 0", "--route split"),
        ("simulate --log /no/such/file", "--log"),
        ("simulate --tuned /no/such/file", "--tuned"),
        ("simulate --predictor-tax 0.5", "--predictor-tax"),
        ("simulate --itl-slack 0", "--itl-slack"),
        ("simulate --decode-policy best", "--decode-policy"),
        ("plan", "--gpus"),
        ("plan --gpus 0", "--gpus"),
        ("plan --gpus 4 ttft:5", "ttft:5"),
        ("plan --gpus 4 --slo ttft", "ttft"),
        ("plan --gpus 4 --slo ttft:1 ttft:2", "two bounds"),
        ("plan --gpus 4 --slo ttft:-1", "ttft:-1"),
        ("plan --gpus 4 --slo best", "best"),
        ("plan --gpus 4 --target 1.5", "--target"),
        ("plan --gpus 4 --sweep route", "--sweep"),
        ("plan --gpus 4 --sweep prefill=1,2", "--sweep"),
        ("plan --gpus 4 --preset cpu-52m --preset gpu-estimate", "same number of GPUs"),
        ("plan --gpus 4 --prefill 1", "--prefill"),
    ],
)
def test_a_mistake_is_code_2_and_runs_nothing(ran: Ran, words: str, told: str) -> None:
    result = invoke(*words.split())
    assert result.exit_code == 2
    assert told in result.stderr
    assert ran.simulated == [] and ran.planned == []


@pytest.mark.parametrize("command", [("simulate",), ("plan", "--gpus", "2")])
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (StartError("no such thing"), 2, "tinfer: no such thing\n"),
        (FileNotFoundError(2, "not there", "/x"), 2, "tinfer: /x: not there\n"),
        (KeyboardInterrupt(), 130, ""),
        (None, 1, ""),
    ],
)
def test_ends(
    ran: Ran, command: tuple[str, ...], error: BaseException | None, code: int, told: str
) -> None:
    ran.error, ran.code = error, 1
    result = invoke(*command)
    assert (result.exit_code, result.stderr) == (code, told)


# --- the real thing ------------------------------------------------------------------------------

SMALL = "simulate --preset paper --num-requests 24 --seed 5".split()


def test_equal_options_give_equal_bytes_but_for_the_date(tmp_path: Path) -> None:
    words = [*SMALL, "--request-rate", "2", "--baseline", "replicas,replicas-512,hybrid,paper"]
    written = []
    for name in ("a.json", "b.json"):
        path = tmp_path / name
        result = invoke(*words, "--noise", "0.1", "--json", str(path))
        assert result.exit_code == 0, result.output
        assert "TTFT mean (ms)" in result.stdout and "perf/$ (paper's form)" in result.stdout
        written.append(path.read_bytes().split(b"\n"))
    differing = [a for a, b in zip(*written, strict=True) if a != b]
    assert all(b'"date"' in line for line in differing)
    found = msgspec.json.decode(b"\n".join(written[0]))
    assert list(found["arms"]) == ["tinfer", "replicas", "replicas-512", "hybrid", "paper"]
    assert found["num_requests"] == 24 and found["offered_rate"] == pytest.approx(2.0)


def test_another_seed_gives_other_figures() -> None:
    outputs = {invoke(*SMALL[:-1], seed, "--json", "-").stdout.split("arms")[1] for seed in "56"}
    assert len(outputs) == 2


def test_a_log_is_played_once_more_at_another_speed(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    records = [
        LogRecord(
            request_id=f"r{i}",
            arrival_s=10.0 + i,
            task="chat",
            prompt_tokens=100 + i,
            max_output_tokens=50,
            output_tokens=20 + i,
        )
        for i in range(8)
    ]
    write_log(log, records)
    words = ["simulate", "--log", str(log), "--json", "-", "--save-detailed"]
    as_it_was = msgspec.json.decode(invoke(*words).stdout)
    faster = msgspec.json.decode(invoke(*words, "--request-rate", "16").stdout)
    once = msgspec.json.decode(invoke(*words, "--request-rate", "inf").stdout)
    few = msgspec.json.decode(invoke(*words, "--num-requests", "3").stdout)

    def arrivals(result: Any) -> list[float]:
        return [one["arrival_s"] for one in result["arms"]["tinfer"]["requests"]]

    assert arrivals(as_it_was) == [float(i) for i in range(8)]
    assert arrivals(faster) == pytest.approx([i / 14 for i in range(8)], abs=1e-6)
    assert arrivals(once) == [0.0] * 8 and once["offered_rate"] is None
    assert arrivals(few) == [0.0, 1.0, 2.0]
    assert [one["output_tokens"] for one in as_it_was["arms"]["tinfer"]["requests"]] == [
        20 + i for i in range(8)
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workload", "none"], "no workload is called none"),
        (["--request-rate", "1e-300"], "arrives at 1.89802e+299 s"),
        (["--baseline", "best"], "no baseline is called best"),
        (["--prefill", "0", "--decode", "2", "--baseline", "hybrid"], "hybrid needs"),
        (["--workload", "burst", "--workload-option", "cv=-1"], "burst"),
        (["--json", "/no/such/folder/x.json"], "cannot write"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(words: list[str], told: str) -> None:
    result = invoke("simulate", "--num-requests", "2", *words)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and told in result.stderr


def test_a_log_of_more_time_than_can_be_simulated(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    record = LogRecord(
        request_id="a", arrival_s=0.0, prompt_tokens=5, max_output_tokens=5, output_tokens=5
    )
    write_log(log, [record, replace(record, request_id="b", arrival_s=1e300)])
    for words in (["simulate"], ["plan", "--gpus", "2"]):
        result = invoke(*words, "--log", str(log))
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1 and "b arrives at 1e+300 s" in result.stderr


def test_a_log_that_is_none(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text("{}\n")
    result = invoke("simulate", "--log", str(log))
    assert result.exit_code == 2 and "line 1 of the request log" in result.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn here, because matplotlib keeps its font file open from the first picture on."""
    folder = tmp_path_factory.mktemp("simulate") / "new"
    result = invoke(*SMALL, "--baseline", "replicas", "--plot", str(folder))
    assert result.exit_code == 0, result.output
    return folder


def test_pictures(pictures: Path) -> None:
    drawn = {path.name: path.stat().st_size for path in pictures.iterdir()}
    assert drawn.keys() == {"latency.png", "timeline-tinfer.png", "timeline-replicas.png"}
    assert min(drawn.values()) > 5000


def test_one_phase_of_workers_is_simulated_too() -> None:
    words = ["--prefill", "0", "--decode", "2", "--route", "whole", "--json", "-"]
    found = msgspec.json.decode(invoke(*SMALL, *words).stdout)
    assert found["arms"]["tinfer"]["routes"] == {"whole": 24}
