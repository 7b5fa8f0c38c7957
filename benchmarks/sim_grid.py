"""Is `auto` ever worse, and what does it win where prefills and decodes disturb each other?

Every workload at every load, on every number of workers of every box, in the simulator: tinfer's
`auto`, its `split`, a static hybrid and plain replicas (vLLM's own step budget, and 512 tokens),
all on the same requests. 100 % load is the highest Poisson rate at which the better replicas' queue
is bounded, judged as `tinfer bench compare` does. Listed first are the cells in which auto is worse
than the best other arm by mean E2EL or throughput, then those in which interference binds.

    python benchmarks/sim_grid.py --runs sim_grid.jsonl --json sim_grid.json --plot plots
    python benchmarks/sim_grid.py --boxes cpu-52m --workers 2 --loads 0.5,0.95 --num-requests 200 \\
        --seeds 2 --runs small.jsonl

A box is a preset, or NAME=FILE with a file of `tinfer tune`. Results are appended to --runs as they
come; what is there already is not computed again, so an interrupted grid goes on where it was.
--report only reads them.

The result of --json has `options`, the `engines` by box, `full_loads` (100 % load and the SLOs, by
box, workers and workload) and `cells`, each a `Verdict` of tinfer/sim/grid.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

import tinfer
from tinfer.bench.compare.capacity import RateSearch, judge
from tinfer.cli.sim_options import measured
from tinfer.config import ServeConfig
from tinfer.master.scheduling import scheduler_config
from tinfer.sim import grid
from tinfer.sim.arms import Arm, baseline_arm, run_arm
from tinfer.sim.baselines import unloaded_slos
from tinfer.sim.boxes import Box, preset_box
from tinfer.sim.grid import Cell, CellTask, Figures, Slos, Verdict
from tinfer.sim.paired import Estimate
from tinfer.sim.parallel import default_jobs, done_in_parallel
from tinfer.sim.planner import configured, guessed_rps
from tinfer.sim.plots import figure, saved
from tinfer.sim.report import encoded, number, table
from tinfer.sim.sources import Source, requests_of
from tinfer.sim.spec import EngineSpec, SimRequest
from tinfer.sim.workload import sim_requests

BOXES = ("cpu-52m", "paper", "gpu-estimate")
# Draws of the cells count up from 0.
PROBE_SEED = 999
NUM_UNLOADED = 20
# A probe's arrivals last as long as so many of the longest answers, or it has this many requests.
PROBE_ANSWERS = 5.0
MAX_PROBE_REQUESTS = 20_000


class Options(Struct, frozen=True, kw_only=True):
    """What decides about the runs; two that differ have no place in one file of runs."""

    num_requests: int = 2000
    probe_requests: int = 1000
    max_tokens: int = 4096
    config: dict[str, str] = {}


class Full(Struct, frozen=True, kw_only=True):
    """100 % load of a workload on so many workers of a box, and its classes' SLOs."""

    box: str
    num_workers: int
    workload: str
    rate_rps: float | None
    slos: Slos

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.box, self.num_workers, self.workload)


class Run(Struct, frozen=True, kw_only=True):
    """One draw of one cell, as a line of the file of runs."""

    cell: Cell
    seed: int
    offered_rps: float
    arms: Figures


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of that file: the options, a full load, or a run."""

    options: Options | None = None
    full: Full | None = None
    run: Run | None = None


class FullTask(Struct, frozen=True, kw_only=True):
    """A search for 100 % load."""

    box: Box
    num_workers: int
    workload: str
    options: Options


# --- 100 % load ----------------------------------------------------------------------------------


def full_load(task: FullTask) -> Full:
    """The rate; None where even the lowest one probed is too much.

    Arrivals of a probe last several times as long as the longest answer: a queue that grows has to
    have the time to show it.
    """
    config = configured(ServeConfig(), task.options.config)
    replicas = [baseline_arm(kind, task.box, 0, task.num_workers, config) for kind in grid.REPLICAS]
    least = task.options.probe_requests
    requests = _probe(task, 1.0, least)
    longest_s = _longest_s(requests, task.box)
    search = RateSearch(guessed_rps(task.box.replica, task.num_workers, requests))
    while search.next_rps is not None:
        num = math.ceil(search.next_rps * PROBE_ANSWERS * longest_s)
        probe = _probe(task, search.next_rps, min(MAX_PROBE_REQUESTS, max(least, num)))
        search.tell(any(_is_bounded(arm, probe, task.box, longest_s) for arm in replicas))
    return Full(
        box=task.box.name,
        num_workers=task.num_workers,
        workload=task.workload,
        rate_rps=search.best_rps,
        slos=unloaded_slos(task.box.replica, requests),
    )


def _probe(task: FullTask, rate_rps: float, num_requests: int) -> tuple[SimRequest, ...]:
    source = Source(
        workload=task.workload,
        num_requests=num_requests,
        rate_rps=rate_rps,
        burstiness=1.0,
        seed=PROBE_SEED,
    )
    return _requests(source, task.box, task.options)


def _is_bounded(arm: Arm, requests: Sequence[SimRequest], box: Box, longest_s: float) -> bool:
    run = run_arm(arm, requests)
    if not all(one.ok for one in run.requests):
        return False
    sent_s = [one.arrival_s for one in run.requests]
    end_s = [one.last_token_s or 0.0 for one in run.requests]
    alone_s = [_alone_s(one, box.replica) for one in requests]
    return judge(sent_s, end_s, alone_s, 0, longest_s).bounded


def _longest_s(requests: Sequence[SimRequest], box: Box) -> float:
    """The longest of the first requests of each class, each alone on a replica."""
    by_task: dict[str, list[float]] = {}
    for one in requests:
        by_task.setdefault(one.task, []).append(_alone_s(one, box.replica))
    return max(max(of_task[:NUM_UNLOADED]) for of_task in by_task.values())


def _alone_s(request: SimRequest, engine: EngineSpec) -> float:
    """What a request takes on an idle replica, but for messages."""
    costs, prompt_tokens = engine.costs, request.prompt_tokens
    kv_tokens = prompt_tokens + request.output_tokens / 2.0
    later_s = (request.output_tokens - 1) * costs.decode_step_s(1, kv_tokens)
    return costs.prefill_s(prompt_tokens, engine.max_num_batched_tokens) + later_s


def _requests(source: Source, box: Box, options: Options) -> tuple[SimRequest, ...]:
    return sim_requests(requests_of(source), box.decode.block_tokens, options.max_tokens)


# --- cells ---------------------------------------------------------------------------------------


def cell_task(box: Box, full: Full, load: float, seed: int, options: Options) -> CellTask:
    """One draw of one cell; `full` has a rate."""
    assert full.rate_rps is not None
    chunk = grid.saturating_chunk(box.decode.costs)
    config = configured(
        ServeConfig(max_num_batched_tokens=max(chunk, ServeConfig().max_num_seqs)), options.config
    )
    rate_rps = load * full.rate_rps
    return CellTask(
        cell=Cell(full.box, full.num_workers, full.workload, load),
        seed=seed,
        source=Source(
            workload=full.workload,
            num_requests=options.num_requests,
            rate_rps=rate_rps,
            seed=seed,
        ),
        offered_rps=rate_rps,
        arms=grid.arms_of(box, full.num_workers, config, scheduler_config),
        slos=full.slos,
        block_tokens=box.decode.block_tokens,
        max_tokens=options.max_tokens,
    )


class Runs:
    """The file of runs: what is in it, and what is appended.

    `options` None only reads, and takes those of the file.
    """

    def __init__(self, path: Path, options: Options | None) -> None:
        self._path = path
        self.options = options or Options()
        self.full: dict[tuple[str, int, str], Full] = {}
        self.runs: dict[tuple[Cell, int], Run] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for line in filter(None, whole.splitlines()):
            self._take(msgspec.json.decode(line, type=Line))
        if options is None:
            return
        if self.options != options:
            raise SystemExit(f"{path} has runs with other options: {self.options}")
        # A torn last line is cut off, so that what is appended stands alone.
        path.write_bytes(whole)
        if not whole:
            self.add(Line(options=options))

    def add(self, line: Line) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
        self._take(line)

    def _take(self, line: Line) -> None:
        if line.options is not None:
            self.options = line.options
        if line.full is not None:
            self.full[line.full.key] = line.full
        if line.run is not None:
            self.runs[line.run.cell, line.run.seed] = line.run


def run_grid(
    runs: Runs,
    boxes: Mapping[str, Box],
    keys: Sequence[tuple[str, int, str]],
    loads: Sequence[float],
    seeds: Sequence[int],
    options: Options,
    num_jobs: int,
) -> None:
    """Everything that is not there yet. Ctrl-C ends it with what is there."""
    searches = [
        FullTask(box=boxes[box], num_workers=num, workload=workload, options=options)
        for box, num, workload in keys
        if (box, num, workload) not in runs.full
    ]
    for _, full in done_in_parallel(full_load, searches, num_jobs, "full loads", True):
        runs.add(Line(full=full))
    # All cells of a draw come before the next draw: an early look has something of everything.
    tasks = [
        cell_task(boxes[key[0]], runs.full[key], load, seed, options)
        for seed in seeds
        for key in keys
        if runs.full[key].rate_rps is not None
        for load in loads
        if (Cell(*key, load), seed) not in runs.runs
    ]
    for place, figures in done_in_parallel(grid.simulated, tasks, num_jobs, "draws", True):
        task = tasks[place]
        run = Run(cell=task.cell, seed=task.seed, offered_rps=task.offered_rps, arms=figures)
        runs.add(Line(run=run))


def verdicts_of(runs: Iterable[Run]) -> list[Verdict]:
    """One per cell, in their order; draws in the order of their seeds."""
    by_cell: dict[Cell, list[Run]] = {}
    for run in sorted(runs, key=lambda one: (one.cell, one.seed)):
        by_cell.setdefault(run.cell, []).append(run)
    return [
        grid.verdict_of(cell, draws[0].offered_rps, [draw.arms for draw in draws])
        for cell, draws in by_cell.items()
    ]


# --- as text -------------------------------------------------------------------------------------


def text(verdicts: Sequence[Verdict], full: Iterable[Full], everything: bool) -> Iterator[str]:
    worse = sorted((v for v in verdicts if v.is_worse), key=grid.distance, reverse=True)
    yield f"{len(verdicts)} cells; auto is worse than the best other arm in {len(worse)}"
    if worse:
        yield from table(_rows(worse))
    yield ""
    binding = grid.gains(verdicts)
    short = [v for v in binding if v.goodput is not None and v.goodput.value < grid.BINDING_GAIN]
    yield (
        f"interference binds in {len(binding)} cells; auto's goodput is under "
        f"{grid.BINDING_GAIN:g} times the better replicas' in {len(short)}"
    )
    if binding:
        yield from table(_gain_rows(binding))
    for verdict in verdicts:
        for arm, error in verdict.errors.items():
            yield f"stuck: {_cell(verdict.cell)} {arm}: {error}"
        for arm, num in verdict.failed.items():
            yield f"failed: {_cell(verdict.cell)} {arm}: {num} requests"
    for one in full:
        if one.rate_rps is None:
            yield f"no full load: {one.box} x{one.num_workers} {one.workload}"
    if everything:
        yield ""
        yield from table(_rows(verdicts))


def _cell(cell: Cell) -> str:
    return f"{cell.box} x{cell.num_workers} {cell.workload} at {cell.load:g}"


def _rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    rows = [["cell", "req/s", "mean E2EL", "to", "throughput", "to", "goodput", "good", "to"]]
    for one in verdicts:
        e2el, throughput = _ratio(one.e2el), _ratio(one.throughput)
        best = [e2el, one.best_e2el, throughput, one.best_throughput]
        good = [_ratio(one.goodput), f"{100 * one.good_share:.0f} %", one.replicas]
        rows.append([_cell(one.cell), number(one.offered_rps), *best, *good])
    return rows


def _gain_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    rows = [["cell", "replicas good", "goodput, loose", "tight", "mean E2EL", "to"]]
    for one in verdicts:
        cells = [_cell(one.cell), f"{100 * one.good_share:.0f} % ({one.replicas})"]
        ratios = [_ratio(one.goodput), _ratio(one.goodput_tight), _ratio(one.e2el)]
        rows.append([*cells, *ratios, one.best_e2el])
    return rows


def _ratio(one: Estimate | None) -> str:
    if one is None:
        return "-"
    if one.low is None or one.high is None:
        return f"x{one.value:.3f}"
    return f"x{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


# --- as pictures ---------------------------------------------------------------------------------


def draw(verdicts: Sequence[Verdict], folder: Path) -> list[Path]:
    """Two maps per box, workloads by loads for each number of workers: E2EL and goodput."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for box in dict.fromkeys(one.cell.box for one in verdicts):
        mine = [one for one in verdicts if one.cell.box == box]
        for name, words in (("e2el", "mean E2EL, to the best other arm"), ("goodput", "goodput")):
            values = {one.cell: getattr(one, name) for one in mine}
            path = folder / f"sim_grid-{box}-{name}.png"
            # Red is worse: higher for a latency, lower for goodput.
            drawn.append(_map(values, f"{box}: auto's {words}", name == "e2el", path))
    return drawn


def _map(values: Mapping[Cell, Estimate | None], title: str, red_is_high: bool, path: Path) -> Path:
    nums = sorted({cell.num_workers for cell in values})
    workloads = list(dict.fromkeys(cell.workload for cell in values))
    loads = sorted({cell.load for cell in values})
    made, panels = figure(1.5 + 4.2 * len(nums), 1.6 + 0.45 * len(workloads), columns=len(nums))
    by_place = {(c.num_workers, c.workload, c.load): one for c, one in values.items()}
    for axes, num in zip(panels, nums, strict=True):
        shown = np.full((len(workloads), len(loads)), np.nan)
        for row, workload in enumerate(workloads):
            for column, load in enumerate(loads):
                one = by_place.get((num, workload, load))
                if one is not None:
                    shown[row, column] = one.value
                    axes.text(column, row, f"{one.value:.2f}", ha="center", va="center", size=8)
        colours = "RdYlGn_r" if red_is_high else "RdYlGn"
        axes.imshow(
            np.log2(np.clip(shown, 0.5, 2.0)), cmap=colours, vmin=-1.0, vmax=1.0, aspect="auto"
        )
        axes.set_xticks(range(len(loads)), [f"{100 * load:g} %" for load in loads])
        axes.set_yticks(range(len(workloads)), workloads)
        axes.set_title(f"{title}, {num} workers", fontsize="small")
    return saved(made, path)


# --- the command ---------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(words)
    options = Options(
        num_requests=given.num_requests,
        probe_requests=given.probe_requests,
        max_tokens=given.max_tokens,
        config=dict(pair.split("=", 1) for pair in given.option),
    )
    keys = [(b, n, w) for b in given.boxes for n in given.workers for w in given.workloads]
    runs = Runs(given.runs, None if given.report else options)
    started_s = time.monotonic()
    if not given.report:
        with contextlib.suppress(KeyboardInterrupt):
            run_grid(runs, given.boxes, keys, given.loads, range(given.seeds), options, given.jobs)
    verdicts = verdicts_of(runs.runs.values())
    print("\n".join(text(verdicts, runs.full.values(), given.all)))
    if given.json is not None:
        head = {
            "date": time.strftime("%Y-%m-%d"),
            "version": tinfer.__version__,
            "python": platform.python_version(),
            "wall_s": round(time.monotonic() - started_s, 1),
            "options": runs.options,
            "engines": {name: box.decode for name, box in given.boxes.items()},
        }
        body = {"full_loads": list(runs.full.values()), "cells": verdicts}
        given.json.write_bytes(encoded({**head, **body}))
    if given.plot is not None:
        for path in draw(verdicts, given.plot):
            print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--boxes", type=_boxes, default=_boxes(",".join(BOXES)))
    nums = grid.NUMS_OF_WORKERS
    parser.add_argument("--workers", type=lambda t: tuple(map(int, _words(t))), default=nums)
    parser.add_argument("--workloads", type=_words, default=grid.WORKLOADS)
    parser.add_argument("--loads", type=lambda t: tuple(map(float, _words(t))), default=grid.LOADS)
    parser.add_argument("--num-requests", type=int, default=2000, help="of a draw of a cell")
    parser.add_argument("--probe-requests", type=int, default=1000, help="of a look for full load")
    parser.add_argument("--seeds", type=int, default=5, help="draws of a cell")
    parser.add_argument("--max-tokens", type=int, default=4096, help="what clients allow")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of `tinfer serve`"
    )
    parser.add_argument("--jobs", type=int, default=default_jobs())
    parser.add_argument("--runs", type=Path, required=True, help="where runs are appended")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--all", action="store_true", help="list every cell")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="draw into this folder")
    return parser


def _boxes(words: str) -> dict[str, Box]:
    """By name; the name is the preset's, or the one given to a measured box."""
    boxes = {}
    for word in _words(words):
        name, _, file = word.partition("=")
        boxes[name] = replace(measured(Path(file)) if file else preset_box(name), name=name)
    return boxes


def _words(text_: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text_.split(",") if word.strip())


if __name__ == "__main__":
    main()
