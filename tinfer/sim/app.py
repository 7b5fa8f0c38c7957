"""`tinfer simulate` from options to exit code: requests, arms, runs, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from tqdm import tqdm

import tinfer
from tinfer.config import ServeConfig
from tinfer.sim import report
from tinfer.sim.arms import SPLIT_FROM_TOKENS, Arm, SchedulerOf, baseline_arm, run_arm, tinfer_arm
from tinfer.sim.baselines import unloaded_slos
from tinfer.sim.boxes import Box, taxed, with_noise
from tinfer.sim.results import SimRun
from tinfer.sim.sources import Source, requests_of
from tinfer.sim.workload import sim_requests
from tinfer.sim.world import SimulationError

EXIT_OK = 0
EXIT_STUCK = 1
ARM = "tinfer"


class SimulateOptions(Struct, frozen=True, kw_only=True):
    """What `tinfer simulate` was asked for.

    `config` are the options of `tinfer serve`; of `prefill` and `decode` None is one worker.
    `max_tokens` is what clients allow; None: exactly the answer's length. `predictor_tax` is how
    many times as long a step of a prefill worker takes beside a length predictor.
    """

    source: Source
    box: Box
    config: ServeConfig = ServeConfig()
    baselines: tuple[str, ...] = ()
    split_from_tokens: int = SPLIT_FROM_TOKENS
    max_tokens: int | None = None
    predictor_tax: float = 1.0
    noise: float = 0.0
    json_path: str | None = None
    save_detailed: bool = False
    plot_dir: Path | None = None
    show_progress: bool = False


def run(options: SimulateOptions, scheduler_of: SchedulerOf) -> int:
    """Simulate and report; returns the exit code.

    0: all runs went to their end; 1: in one of them a request is never answered, which is said.
    Raises `StartError` for what cannot be simulated, `OSError` where a result cannot be written.
    """
    try:
        result, runs = simulated(options, scheduler_of)
    except SimulationError as error:
        sys.stderr.write(f"tinfer: {error}\n")
        return EXIT_STUCK
    write(result, options.json_path, report.text(result))
    if options.plot_dir is not None:
        from tinfer.sim.plots import draw_runs

        for path in draw_runs(runs, options.plot_dir):
            sys.stderr.write(f"drawn: {path}\n")
    return EXIT_OK


def simulated(
    options: SimulateOptions, scheduler_of: SchedulerOf
) -> tuple[report.Result, Mapping[str, SimRun]]:
    """The result without its date, and the runs by arm. Raises as `run`, and `SimulationError`."""
    arms = arms_of(options, scheduler_of)
    drawn = requests_of(options.source)
    requests = sim_requests(drawn, options.box.decode.block_tokens, options.max_tokens)
    slos = unloaded_slos(options.box.replica, requests)
    runs = [
        run_arm(arm, requests, options.source.seed)
        for arm in tqdm(
            arms, desc="arms", file=sys.stderr, disable=not options.show_progress, leave=False
        )
    ]
    result = report.result_of(_settings(options), arms, runs, slos, options.save_detailed)
    return result, {arm.name: one for arm, one in zip(arms, runs, strict=True)}


def arms_of(options: SimulateOptions, scheduler_of: SchedulerOf) -> list[Arm]:
    """tinfer first, then its baselines. Raises `StartError`."""
    config = options.config
    num_prefill = 1 if config.prefill is None else config.prefill
    num_decode = 1 if config.decode is None else config.decode
    box = with_noise(options.box, options.noise)
    own = msgspec.structs.replace(box, prefill=taxed(box.prefill, options.predictor_tax))
    mine = tinfer_arm(ARM, own, num_prefill, num_decode, config, scheduler_of)
    beside = [
        baseline_arm(kind, box, num_prefill, num_decode, config, options.split_from_tokens)
        for kind in options.baselines
    ]
    return [mine, *beside]


def write(result: Mapping[str, Any], json_path: str | None, lines: Iterable[str]) -> None:
    """The result as JSON to a file beside the lines, or alone where the path is `-`."""
    whole = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "version": tinfer.__version__, **result}
    text = report.encoded(whole)
    if json_path == "-":
        sys.stdout.write(text.decode())
        return
    sys.stdout.write("\n".join(lines) + "\n")
    if json_path is not None:
        Path(json_path).write_bytes(text)


def _settings(options: SimulateOptions) -> dict[str, Any]:
    """What the run followed from."""
    source = msgspec.to_builtins(options.source)
    if options.source.rate_rps == float("inf"):
        source["rate_rps"] = "inf"
    return {
        "requests": options.source.name,
        "box": f"{options.box.name} ({options.box.source})",
        "source": source,
        "config": simulated_fields(options.config.with_measured_chunk(options.box.chunk_tokens)),
        "engine": msgspec.to_builtins(options.box.decode),
        "baselines": options.baselines,
        "split_from_tokens": options.split_from_tokens,
        "max_tokens": options.max_tokens,
        "predictor_tax": options.predictor_tax,
        "noise": options.noise,
    }


def simulated_fields(config: ServeConfig) -> dict[str, Any]:
    """The options that differ from those of a plain `tinfer serve`."""
    default = ServeConfig()
    return {
        name: value
        for name in ServeConfig.__struct_fields__
        if (value := getattr(config, name)) != getattr(default, name)
    }
