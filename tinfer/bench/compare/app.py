"""`tinfer bench compare` from options to exit code: plan, measure, compare, report.

The result (`--json`) is one object:

| key | holds |
|---|---|
| `kind` | "tinfer bench compare" |
| `date`, `command`, `versions`, `hardware`, `settings`, `seed` | what it takes to run it again |
| `resumed` | dates of the earlier parts that --resume went on from |
| `ended_early` | null, "interrupted", or why the measuring ended before its end |
| `vocab_size`, `max_model_len` | of the model, as the first server and its files said |
| `arms` | of each: `name`, `kind`, `servers` with command lines (port aside) and environment, |
|  | and `scheduler`: what tinfer decides by, such as the costs of a step; null of others |
| `unloaded` | by request class: medians alone on one replica, in seconds |
| `slos` | by level and class: bounds in milliseconds |
| `full_load` | by workload: the rate that 100 % stands for, the arm that keeps up, all probes |
| `runs` | every run in its order, `figures` as `tinfer bench serve` names them |
| `points` | by workload and load: `arms` -> metric (see `metrics`) -> `value`, `ratio`, `verdict` |
| `losses`, `wins` | metrics of tinfer arms, or else of all, whose whole interval is on one side |
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from tinfer.bench.compare import report
from tinfer.bench.compare.arms import Arm, servers_of
from tinfer.bench.compare.comparison import PointResult, compare_point, lines_of
from tinfer.bench.compare.hardware import hardware_of, versions
from tinfer.bench.compare.journal import Journal, journal_path, opened
from tinfer.bench.compare.limits import slos_of
from tinfer.bench.compare.options import CompareOptions, usable_cores, with_devices
from tinfer.bench.compare.recorded import Recorded, Run
from tinfer.bench.compare.session import record
from tinfer.bench.compare.steps import points_of, steps_of
from tinfer.bench.interruption import stop_on_signals
from tinfer.bench.report import say
from tinfer.errors import StartError

EXIT_OK = 0
EXIT_ENDED_EARLY = 1
EXIT_INTERRUPTED = 130


def run(options: CompareOptions, arms: Sequence[Arm]) -> int:
    """Measure and report; returns the exit code.

    0: everything was measured; 1: a server failed on the way, and what was measured by then is
    reported; 130: interrupted, likewise. Raises `StartError` and `OSError` where nothing was.
    """
    options = with_devices(options, usable_cores())
    _check(options, arms)
    if options.dry_run:
        sys.stdout.writelines(f"{line}\n" for line in dry_run_lines(options, arms))
        return EXIT_OK
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    journal, recorded = opened(options, arms, date)
    is_written = False
    try:
        _measure(options, arms, journal, recorded)
        points = compared(options, arms, recorded)
        result = result_of(options, arms, recorded, points, date)
        _write(options, arms, result, points, recorded)
        is_written = recorded.ended_early is None
    finally:
        journal.close(remove=is_written)
    if is_written:
        return EXIT_OK
    return EXIT_INTERRUPTED if recorded.ended_early == "interrupted" else EXIT_ENDED_EARLY


def _check(options: CompareOptions, arms: Sequence[Arm]) -> None:
    names = [arm.name for arm in arms]
    if options.baseline is not None and options.baseline not in names:
        raise StartError(f"--baseline {options.baseline} is none of {', '.join(names)}")


def _measure(
    options: CompareOptions, arms: Sequence[Arm], journal: Journal, recorded: Recorded
) -> None:
    """Measure on the devices' cores alone, which are this process's too for that time."""
    before = usable_cores()
    # vLLM leaves files in its temporary directory when it ends.
    with tempfile.TemporaryDirectory(prefix="tinfer-compare-") as scratch:
        (options.log_dir or Path(scratch)).mkdir(parents=True, exist_ok=True)
        if options.cores:
            os.sched_setaffinity(0, options.cores)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_until_ctrl_c(options, arms, Path(scratch), journal, recorded))
        finally:
            os.sched_setaffinity(0, before)


async def _until_ctrl_c(
    options: CompareOptions,
    arms: Sequence[Arm],
    scratch: Path,
    journal: Journal,
    recorded: Recorded,
) -> None:
    with stop_on_signals() as stop:
        await record(options, arms, scratch, stop, say, journal, recorded)


def compared(options: CompareOptions, arms: Sequence[Arm], recorded: Recorded) -> list[PointResult]:
    """Every point of which all arms have a whole repetition."""
    replicas = [arm.name for arm in arms if arm.is_replicas]
    candidates = [options.baseline] if options.baseline is not None else replicas
    results = []
    for number, point in enumerate(points_of(options)):
        mine = [run for run in recorded.runs if run.step.point == point]
        mine.sort(key=lambda run: run.step.repetition)
        samples = {
            arm.name: [run.sample for run in mine if run.step.arm == arm.name] for arm in arms
        }
        if mine:
            rate_rps = mine[0].rate_rps
            seed = options.seed + number
            result = compare_point(
                point, rate_rps, samples, candidates, options.num_resamples, seed
            )
            results += [result] if result is not None else []
    return results


def result_of(
    options: CompareOptions,
    arms: Sequence[Arm],
    recorded: Recorded,
    points: Sequence[PointResult],
    date: str,
) -> dict[str, Any]:
    """The object that `--json` writes; see the module."""
    judged = judged_of(arms)
    slos = slos_of(recorded.unloaded)
    return {
        "kind": "tinfer bench compare",
        "date": date,
        "command": shlex.join(["tinfer", *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware_of(options.device, options.cores, options.gpus),
        "settings": msgspec.to_builtins(options, enc_hook=str),
        "seed": options.seed,
        "resumed": recorded.resumed,
        "ended_early": recorded.ended_early,
        "vocab_size": recorded.vocab_size,
        "max_model_len": None if recorded.target is None else recorded.target.max_model_len,
        "arms": [
            _arm(arm, options) | {"scheduler": recorded.schedulers.get(arm.name)} for arm in arms
        ],
        "unloaded": msgspec.to_builtins(recorded.unloaded),
        "slos": {
            level: {task: slo.bounds() for task, slo in by_task.items()}
            for level, by_task in slos.items()
        },
        "full_load": msgspec.to_builtins(recorded.full_load),
        "runs": [_run(run) for run in recorded.runs],
        "points": msgspec.to_builtins(points),
        "losses": msgspec.to_builtins(lines_of(points, "worse", judged)),
        "wins": msgspec.to_builtins(lines_of(points, "better", judged)),
    }


def judged_of(arms: Sequence[Arm]) -> list[str]:
    """The arms whose losses and wins are told: tinfer's, or where there are none, all."""
    return [arm.name for arm in arms if arm.is_tinfer] or [arm.name for arm in arms]


def _arm(arm: Arm, options: CompareOptions) -> dict[str, Any]:
    servers = [
        {
            "command": shlex.join(server.argv),
            "environment": dict(server.environment),
            "engine_cores": server.engine_cores,
            "front_cores": server.front_cores,
        }
        for server in servers_of(arm, options)
    ]
    return {"name": arm.name, "kind": arm.kind, "servers": servers}


def _run(run: Run) -> dict[str, Any]:
    sample = run.sample
    good = {f"goodput_{level}": float(good.mean()) for level, good in sample.good.items()}
    return {
        "workload": run.step.point.workload,
        "load": run.step.point.load,
        "repetition": run.step.repetition,
        "arm": run.step.arm,
        "rate_rps": run.rate_rps,
        "idle_cpu_share": run.idle_cpu_share,
        "resource_s": float(sample.resource_s),
        "busy_s": float(sample.busy_s),
        "server_cpu_s": sample.server_cpu_s,
        **{name: share * run.rate_rps for name, share in good.items()},
        "figures": run.figures,
        **({"records": msgspec.to_builtins(run.records)} if run.records is not None else {}),
    }


def dry_run_lines(options: CompareOptions, arms: Sequence[Arm]) -> list[str]:
    """The plan: what would be started and measured, and how long it takes as far as is known."""
    lines = []
    for arm in arms:
        lines.append(f"arm {arm.name} ({arm.kind})")
        for server in servers_of(arm, options):
            bound = (
                "" if server.engine_cores is None else f"  [cores {_cores(server.engine_cores)}]"
            )
            words = [f"{name}={value}" for name, value in server.environment.items()]
            lines.append("  " + " ".join([*words, shlex.join(server.argv), "--port PORT"]) + bound)
    steps = steps_of(options, [arm.name for arm in arms])
    lines.append(f"{len(steps)} runs of {options.num_requests} requests:")
    known_s = 0.0
    for workload in options.workloads:
        # At a full load of F requests/s, a run's arrivals take num_requests / (load F) seconds.
        per_rps = len(arms) * options.repetitions * options.num_requests
        work = sum(per_rps / load for load in options.loads)
        rate_rps = options.full_load.get(workload)
        told = f"{work:.0f} s divided by its full load in req/s, measured first"
        if rate_rps is not None:
            known_s += work / rate_rps
            told = f"{work / rate_rps / 60:.1f} min at a full load of {rate_rps:g} req/s"
        loads = ", ".join(f"{load:g}" for load in options.loads)
        lines.append(f"  {workload} at {loads}: arrivals take {told}")
    if all(workload in options.full_load for workload in options.workloads):
        lines.append(f"arrivals take {known_s / 60:.1f} min in all, answers and starts aside")
    return lines


def _cores(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


def _write(
    options: CompareOptions,
    arms: Sequence[Arm],
    result: dict[str, Any],
    points: Sequence[PointResult],
    recorded: Recorded,
) -> None:
    judged = judged_of(arms)
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if options.json_path == "-":
        sys.stdout.write(text + "\n")
    else:
        losses, wins = lines_of(points, "worse", judged), lines_of(points, "better", judged)
        lines = report.text(points, losses, wins, _header(result))
        sys.stdout.writelines(f"{line}\n" for line in lines)
        if options.json_path is not None:
            Path(options.json_path).write_text(text + "\n")
    _warn(report.warnings(result["runs"]), sys.stderr.write)
    if recorded.ended_early is not None:
        sys.stderr.write(f"tinfer: warning: not complete: {recorded.ended_early}\n")
        if journal_path(options) is not None:
            sys.stderr.write("tinfer: the same command with --resume goes on from here\n")
    if options.plot_dir is not None:
        from tinfer.bench.compare.charts import draw_all

        for path in draw_all(points, recorded.runs, options.plot_dir):
            sys.stderr.write(f"drawn: {path}\n")


def _header(result: dict[str, Any]) -> list[str]:
    hardware = result["hardware"]
    title = "tinfer beside plain vLLM"
    if result["ended_early"]:
        title += f" (not complete: {result['ended_early']})"
    lines = [title, f"{hardware['processor']}, cores {_cores(hardware['cores_used'])}"]
    for workload, found in result["full_load"].items():
        how = "given" if found["arm"] is None else f"by {found['arm']}"
        lines.append(f"100 % of {workload}: {found['rate_rps']:.3f} req/s ({how})")
    for task, one in result["unloaded"].items():
        tpot_ms = 1000 * (one["tpot_s"] or 0.0)
        lines.append(f"{task} alone: TTFT {1000 * one['ttft_s']:.1f} ms, TPOT {tpot_ms:.2f} ms")
    return lines


def _warn(warnings: Any, write: Callable[[str], Any]) -> None:
    for warning in warnings:
        write(f"tinfer: warning: {warning}\n")
