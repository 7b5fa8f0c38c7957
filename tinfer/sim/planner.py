"""`tinfer plan`: which workers and options carry the most load within a service level.

For every configuration the highest rate of arrivals is sought at which a given share of all answers
is good; then they are ranked. All of them, and plain replicas on the same GPUs, get the same
requests: only how fast they arrive differs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.config import ServeConfig, load
from tinfer.errors import StartError
from tinfer.sim.arms import Arm, ReplicasArm, SchedulerOf, replicas_arm, run_arm, tinfer_arm
from tinfer.sim.baselines import TPOT_FACTORS, unloaded_slos
from tinfer.sim.boxes import Box
from tinfer.sim.results import SimRun, Slo, figures_of
from tinfer.sim.sources import Source, at_rate, drawn_anew, requests_of
from tinfer.sim.spec import EngineSpec, SimRequest
from tinfer.sim.workload import sim_requests
from tinfer.sim.world import SimulationError

# Rates that pass and fail end up this close. What is reported passed.
TOLERANCE = 1.01
MAX_PROBES = 24
# Below this part of the first guess a configuration is given up: it meets the SLO at no load.
LEAST_SHARE = 1.0 / 256.0
SWEPT: Mapping[str, tuple[str, ...]] = {
    "route": ("auto", "split"),
    "max_num_batched_tokens": ("512", "2048"),
}
# Of plain replicas; None is vLLM's own.
REPLICA_STEPS = (None, 512)


class Goal(Struct, frozen=True, kw_only=True):
    """What a rate must reach: `share` of all answers within the SLO of their class."""

    slos: dict[str, Slo]
    share: float


class Candidate(Struct, frozen=True, kw_only=True):
    """One configuration: `config` is None for plain replicas. Plain data."""

    arm: Arm
    config: ServeConfig | None
    box: str
    num_devices: int

    @property
    def name(self) -> str:
        """For a reader: the `tinfer serve` line, or what it is."""
        return f"{self.arm.name} ({self.box})" if self.config is None else serve_line(self.config)


class Task(Struct, frozen=True, kw_only=True):
    """The search of one candidate; `first_rps` is where it begins."""

    candidate: Candidate
    source: Source
    goal: Goal
    first_rps: float
    num_draws: int
    max_tokens: int | None


class Found(Struct, frozen=True, kw_only=True):
    """The highest rate that reached the goal, None where none did; figures are of that rate.

    `is_enclosed` is false where every rate did, up to all requests at once: what the candidate
    carries is then more than these requests can show. `error` says what went wrong at some rate,
    which counts as not reaching the goal.
    """

    rate_rps: float | None
    share: float | None
    figures: dict[str, float]
    num_probes: int
    is_enclosed: bool = True
    error: str | None = None


def candidates(
    boxes: Sequence[Box],
    num_gpus: int,
    config: ServeConfig,
    swept: Mapping[str, Sequence[str]],
    scheduler_of: SchedulerOf,
) -> list[Candidate]:
    """Plain replicas on these GPUs, and all configurations; a box is for one number of GPUs per
    worker. Raises `StartError` where an option is bad or no box fits."""
    found = []
    for box in boxes:
        num_workers = num_gpus // box.num_devices
        if num_workers < 1:
            raise StartError(f"{box.name} needs {box.num_devices} GPUs per worker: --gpus is less")
        arms = [replicas_arm(box, num_workers, config, tokens) for tokens in REPLICA_STEPS]
        # Of equal engines one, by the first of their names.
        by_engine = {arm.engine: arm for arm in reversed(arms)}
        found += [_plain(box, arm) for arm in arms if by_engine[arm.engine] is arm]
        configs = _configs(config, swept, box, num_workers)
        found += [_ours(box, one, scheduler_of) for one in configs]
    return found


def _ours(box: Box, config: ServeConfig, scheduler_of: SchedulerOf) -> Candidate:
    num_prefill, num_decode = config.prefill or 0, config.decode or 0
    arm = tinfer_arm("tinfer", box, num_prefill, num_decode, config, scheduler_of)
    num_devices = box.num_devices * (num_prefill + num_decode)
    return Candidate(arm=arm, config=config, box=box.name, num_devices=num_devices)


def _plain(box: Box, arm: ReplicasArm) -> Candidate:
    num_devices = box.num_devices * arm.num_replicas
    return Candidate(arm=arm, config=None, box=box.name, num_devices=num_devices)


def _configs(
    config: ServeConfig, swept: Mapping[str, Sequence[str]], box: Box, num_workers: int
) -> list[ServeConfig]:
    """Every mix of workers under every mix of the swept values, each once. One worker alone
    computes everything whole, whatever `route` says. Raises `StartError`."""
    found: dict[str, ServeConfig] = {}
    for values in itertools.product(*swept.values()):
        words: dict[str, Any] = dict(zip(swept, values, strict=True))
        route = "whole" if num_workers == 1 else words.get("route", config.route)
        for num_prefill in range(1) if route == "whole" else range(1, num_workers):
            words |= {"route": route, "prefill": num_prefill, "decode": num_workers - num_prefill}
            one = configured(config, words | {"tensor_parallel_size": box.num_devices})
            found.setdefault(serve_line(one), one)
    return list(found.values())


def configured(config: ServeConfig, words: Mapping[str, Any]) -> ServeConfig:
    """The configuration with these values, given as a command line would. Raises `StartError`."""
    for name in words:
        if name not in ServeConfig.__struct_fields__:
            raise StartError(f"tinfer serve has no option --{name.replace('_', '-')}")
    return load({**msgspec.structs.asdict(config), **words}, strict=False)


def serve_line(config: ServeConfig) -> str:
    """The `tinfer serve` command of a configuration, with what differs from its defaults."""
    default = ServeConfig()
    words = ["tinfer serve MODEL"]
    for name in ServeConfig.__struct_fields__:
        value = getattr(config, name)
        if value == getattr(default, name) or name == "seed":
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {value}".removesuffix(".0"))
    return " ".join(words)


# --- the goal ------------------------------------------------------------------------------------


def goal_of(
    slo: Slo | str, share: float, engine: EngineSpec, requests: Sequence[SimRequest]
) -> Goal:
    """The goal for these requests: the same bounds for all classes, or a level of the classes' own,
    as multiples of what each takes on an idle `engine`."""
    if isinstance(slo, str):
        return Goal(slos=dict(unloaded_slos(engine, requests)[slo]), share=share)
    return Goal(slos={one.task: slo for one in requests}, share=share)


def parse_slo(words: Sequence[str]) -> Slo | str:
    """`loose`, `tight`, or words as ttft:MILLISECONDS, tpot and e2el. Raises `ValueError`."""
    if len(words) == 1 and words[0] in TPOT_FACTORS:
        return words[0]
    bounds: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise ValueError(f"{word!r} is neither {', '.join(TPOT_FACTORS)} nor NAME:MILLISECONDS")
        if f"{name}_s" in bounds:
            raise ValueError(f"{name} has two bounds")
        try:
            bounds[f"{name}_s"] = float(text) / 1000.0
        except ValueError as error:
            raise ValueError(f"{word!r} is not NAME:MILLISECONDS") from error
        if not 0.0 < bounds[f"{name}_s"] < math.inf:
            raise ValueError(f"{word!r} is not NAME:MILLISECONDS")
    if not bounds:
        raise ValueError("no bound")
    return Slo(**bounds)


def good_share(runs: Sequence[SimRun], slos: Mapping[str, Slo]) -> float:
    """The share of all requests of these runs that were answered within their SLO."""
    answers = [one for run in runs for one in run.requests]
    return sum(slos[one.task].met_by(one) for one in answers) / len(answers)


# --- the search ----------------------------------------------------------------------------------


def guessed_rps(engine: EngineSpec, num_engines: int, requests: Sequence[SimRequest]) -> float:
    """About what so many replicas can compute: where a search begins. Batches of 32 are assumed."""
    batch = min(32, engine.max_num_seqs)
    prompts = sum(one.prompt_tokens for one in requests) / len(requests)
    answers = sum(one.output_tokens for one in requests) / len(requests)
    prompt_s = engine.costs.prefill_s(max(1, round(prompts)), engine.max_num_batched_tokens)
    step_s = engine.costs.decode_step_s(batch, batch * (prompts + answers / 2.0))
    return num_engines / (prompt_s + answers * step_s / batch)


def highest_rate(first_rps: float, passes: Callable[[float], bool]) -> float | None:
    """The highest rate that passes, within `TOLERANCE`; None where none does.

    Doubled or halved until enclosed, then bisected; the middle is that of a ratio. Of rates that do
    not pass in order it finds one that passes with one near above it that does not.
    """
    low: float | None = None
    high: float | None = None
    rate_rps = first_rps
    for _ in range(MAX_PROBES):
        if passes(rate_rps):
            low = rate_rps
        else:
            high = rate_rps
        if high is None:
            rate_rps = 2.0 * rate_rps
        elif low is None:
            rate_rps = rate_rps / 2.0
            if rate_rps < LEAST_SHARE * first_rps:
                break
        elif high / low <= TOLERANCE:
            break
        else:
            rate_rps = math.sqrt(low * high)
    return low


def search(task: Task) -> Found:
    """The highest rate at which one candidate reaches the goal."""
    # Only of rates that pass one can be the answer.
    runs_at: dict[float, list[SimRun]] = {}
    errors: list[str] = []

    def passes(rate_rps: float) -> bool:
        runs_at[rate_rps] = []
        try:
            runs = probed(task, rate_rps)
        except SimulationError as error:
            errors.append(str(error))
            return False
        if good_share(runs, task.goal.slos) < task.goal.share:
            return False
        runs_at[rate_rps] = runs
        return True

    rate_rps = highest_rate(task.first_rps, passes)
    error = errors[0] if errors else None
    if rate_rps is None:
        return Found(rate_rps=None, share=None, figures={}, num_probes=len(runs_at), error=error)
    best = runs_at[rate_rps]
    return Found(
        rate_rps=rate_rps,
        share=good_share(best, task.goal.slos),
        figures=_mean_figures(best),
        num_probes=len(runs_at),
        is_enclosed=max(runs_at) > rate_rps,
        error=error,
    )


def probed(task: Task, rate_rps: float) -> list[SimRun]:
    """One run per draw of the workload at that rate."""
    source = at_rate(task.source, rate_rps)
    runs = []
    for number in range(task.num_draws):
        draw = drawn_anew(source, number)
        requests = sim_requests(requests_of(draw), _block_tokens(task), task.max_tokens)
        runs.append(run_arm(task.candidate.arm, requests, draw.seed))
    return runs


def _block_tokens(task: Task) -> int:
    arm = task.candidate.arm
    engine = arm.engine if isinstance(arm, ReplicasArm) else arm.workers[0].engine
    return engine.block_tokens


def _mean_figures(runs: Sequence[SimRun]) -> dict[str, float]:
    figures = [figures_of(run) for run in runs]
    return {name: sum(one[name] for one in figures) / len(figures) for name in figures[0]}


# --- the ranking ---------------------------------------------------------------------------------


class Ranked(Struct, frozen=True, kw_only=True):
    """A candidate and what was found of it."""

    candidate: Candidate
    found: Found

    @property
    def rate_rps(self) -> float:
        """What it carries, as far as is known: 0 for nothing, infinity for every rate tried."""
        return (self.found.rate_rps or 0.0) if self.found.is_enclosed else math.inf


def ranked(pairs: Sequence[Ranked]) -> list[Ranked]:
    """The highest rate first; of equal ones the lower mean E2EL."""
    return sorted(
        pairs,
        key=lambda one: (
            -one.rate_rps,
            one.found.figures.get("mean_e2el_ms", math.inf),
            one.candidate.name,
        ),
    )


def margin(first: Ranked | None, other: Ranked | None) -> float | None:
    """How many times the other's rate the first one carries; None where either carries none, or
    every rate."""
    if first is None or other is None:
        return None
    rates = (first.rate_rps, other.rate_rps)
    return rates[0] / rates[1] if all(0.0 < rate < math.inf for rate in rates) else None


def best_of(order: Sequence[Ranked], plain: bool) -> Ranked | None:
    """The best of the plain replicas, or of tinfer's configurations."""
    return next((one for one in order if (one.candidate.config is None) is plain), None)
