"""`tinfer plan` from options to exit code: candidates, their searches in parallel, report.

| key | meaning |
|---|---|
| `settings` | what was asked for |
| `slos_ms`, `target_share` | by class: the bounds; the share of answers that must be good |
| `candidates` | the best first; those that carry nothing have a `rate_rps` of null |
| `recommended`, `replicas` | the places of tinfer's best and of the best plain replicas in them |
| `margin_next` | the recommended rate over that of tinfer's next best configuration |
| `margin_replicas` | the same over that of the best plain replicas on as many GPUs |
| `num_planned`, `interrupted` | candidates there were; whether not all of them were looked at |

A candidate has `serve` (the command; null for replicas), `name`, `box`, `num_devices`, `rate_rps`
(the highest at which the target is reached), `good_share` and `figures` there (see `results`),
`num_probes`, `is_enclosed` (false where no rate failed, so that there is no highest one; such
candidates come first, and their margins are null) and `error` (null, or what got stuck at some
rate).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.sim import planner, report
from tinfer.sim.app import simulated_fields, write
from tinfer.sim.arms import SchedulerOf
from tinfer.sim.boxes import Box
from tinfer.sim.parallel import default_jobs, done_in_parallel
from tinfer.sim.planner import Ranked, Task
from tinfer.sim.results import Slo
from tinfer.sim.sources import Source, drawn_anew, requests_of
from tinfer.sim.workload import sim_requests

EXIT_OK = 0
EXIT_NOTHING_CARRIES = 1
EXIT_INTERRUPTED = 130
NUM_SHOWN = 20
_OURS, _PLAIN, _BEST = "tab:blue", "tab:gray", "tab:green"


class PlanOptions(Struct, frozen=True, kw_only=True):
    """What `tinfer plan` was asked for.

    `boxes` are for different numbers of GPUs per worker. `swept` are options of `tinfer serve` and
    the values to try; all others are `config`'s. `slo` is a level or bounds for every class.
    """

    source: Source
    boxes: tuple[Box, ...]
    num_gpus: int
    config: ServeConfig = ServeConfig()
    swept: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=lambda: planner.SWEPT)
    slo: Slo | str = "loose"
    share: float = 0.9
    num_draws: int = 1
    max_tokens: int | None = None
    num_jobs: int | None = None
    json_path: str | None = None
    plot_dir: Path | None = None
    show_progress: bool = False


def run(options: PlanOptions, scheduler_of: SchedulerOf) -> int:
    """Plan and report; returns the exit code.

    0: some configuration of tinfer reaches the target at some rate; 1: none does; 130: interrupted,
    with what was found by then reported. Raises `StartError` for what cannot be planned, and
    `OSError` where a result cannot be written.
    """
    tasks = tasks_of(options, scheduler_of)
    found: list[Ranked] = []
    interrupted = False
    try:
        for place, done in done_in_parallel(
            planner.search,
            tasks,
            options.num_jobs or default_jobs(),
            "configurations",
            options.show_progress,
        ):
            found.append(Ranked(candidate=tasks[place].candidate, found=done))
    except KeyboardInterrupt:
        interrupted = True
    order = planner.ranked(found)
    result = result_of(options, tasks, order, interrupted)
    write(result, options.json_path, text(result))
    if options.plot_dir is not None and order:
        sys.stderr.write(f"drawn: {_draw(options, result, options.plot_dir)}\n")
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_NOTHING_CARRIES if result["recommended"] is None else EXIT_OK


def tasks_of(options: PlanOptions, scheduler_of: SchedulerOf) -> list[Task]:
    """One search per candidate, all for the same goal. Raises `StartError`."""
    boxes = sorted(options.boxes, key=lambda box: box.num_devices)
    reference = boxes[0].replica
    # Of all draws: a class may be missing in the first one.
    requests = [
        request
        for number in range(options.num_draws)
        for request in sim_requests(
            requests_of(drawn_anew(options.source, number)),
            reference.block_tokens,
            options.max_tokens,
        )
    ]
    goal = planner.goal_of(options.slo, options.share, reference, requests)
    everything = planner.candidates(
        boxes, options.num_gpus, options.config, options.swept, scheduler_of
    )
    engines = {box.name: box.replica for box in boxes}
    return [
        Task(
            candidate=one,
            source=options.source,
            goal=goal,
            first_rps=planner.guessed_rps(
                engines[one.box], one.num_devices // engines[one.box].num_devices, requests
            ),
            num_draws=options.num_draws,
            max_tokens=options.max_tokens,
        )
        for one in everything
    ]


def result_of(
    options: PlanOptions, tasks: Sequence[Task], order: Sequence[Ranked], interrupted: bool
) -> dict[str, Any]:
    """The result without its date; `order` is ranked."""
    best, replicas = (planner.best_of(order, plain) for plain in (False, True))
    if best is not None and best.found.rate_rps is None:
        best = None
    others = [one for one in order if one is not best and one.candidate.config is not None]
    goal = tasks[0].goal
    return {
        "settings": {
            "requests": options.source.name,
            "source": msgspec.to_builtins(options.source),
            "boxes": [f"{box.name} ({box.source})" for box in options.boxes],
            "num_gpus": options.num_gpus,
            "config": simulated_fields(options.config),
            "swept": dict(options.swept),
            "num_draws": options.num_draws,
            "max_tokens": options.max_tokens,
        },
        "slos_ms": report.slos_ms(goal.slos),
        "target_share": goal.share,
        "candidates": [_shown(one) for one in order],
        "recommended": None if best is None else order.index(best),
        "replicas": None if replicas is None else order.index(replicas),
        "margin_next": planner.margin(best, others[0] if others else None),
        "margin_replicas": planner.margin(best, replicas),
        "num_planned": len(tasks),
        "interrupted": interrupted,
    }


def _shown(one: Ranked) -> dict[str, Any]:
    candidate, found = one.candidate, one.found
    return {
        "serve": None if candidate.config is None else planner.serve_line(candidate.config),
        "name": candidate.name,
        "box": candidate.box,
        "num_devices": candidate.num_devices,
        "rate_rps": found.rate_rps,
        "good_share": found.share,
        "figures": found.figures,
        "num_probes": found.num_probes,
        "is_enclosed": found.is_enclosed,
        "error": found.error,
    }


def text(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the report."""
    settings = result["settings"]
    percent = f"{100 * result['target_share']:g} %"
    yield f"{settings['requests']} on {settings['num_gpus']} GPUs; {'; '.join(settings['boxes'])}"
    yield f"highest rate at which {percent} of all answers are within their SLO:"
    for task, bounds in result["slos_ms"].items():
        told = ", ".join(
            f"{name.removesuffix('_ms').upper()} {report.number(bound)} ms"
            for name, bound in bounds.items()
            if bound is not None
        )
        yield f"  {task or 'all'}: {told}"
    yield ""
    if result["interrupted"]:
        yield f"interrupted: {len(result['candidates'])} of {result['num_planned']} looked at"
    if result["candidates"]:
        yield from report.table(_rows(result))
        yield ""
    for one in result["candidates"]:
        if one["error"] is not None:
            yield f"stuck at some rate: {one['name']}: {one['error']}"
    yield from _verdict(result)


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "req/s", "good", "TTFT ms", "TPOT ms", "ITL p99 ms", "E2EL ms", "configuration"]]
    shown = result["candidates"][:NUM_SHOWN]
    plain = result["replicas"]
    if plain is not None and plain >= NUM_SHOWN:
        shown = [*shown, result["candidates"][plain]]
    keys = ("mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "mean_e2el_ms")
    for place, one in enumerate(shown):
        share = "-" if one["good_share"] is None else f"{100 * one['good_share']:.1f} %"
        cells = [report.number(one["figures"].get(key)) for key in keys]
        mark = "*" if place == result["recommended"] else ""
        rate = report.number(one["rate_rps"]) if one["is_enclosed"] else "any"
        rows.append([mark, rate, share, *cells, one["name"]])
    return rows


def _verdict(result: Mapping[str, Any]) -> Iterator[str]:
    place = result["recommended"]
    if place is None:
        yield "no configuration of tinfer reaches the target at any rate"
        return
    best = result["candidates"][place]
    if not best["is_enclosed"]:
        yield "no rate is too high for these requests and bounds: more requests would tell how much"
        yield "it carries; until then the best is the one with the lowest mean E2EL:"
        yield f"  {best['serve']}"
        return
    yield f"recommended, for up to {report.number(best['rate_rps'])} requests/s:"
    yield f"  {best['serve']}"
    for words, key in (
        ("its next best configuration", "margin_next"),
        (f"plain replicas on {result['settings']['num_gpus']} GPUs", "margin_replicas"),
    ):
        margin = result[key]
        missing = f"  {words}: no rate to compare with"
        yield f"  x{report.number(margin)} the rate of {words}" if margin else missing


def _draw(options: PlanOptions, result: Mapping[str, Any], folder: Path) -> Path:
    from tinfer.sim.plots import draw_bars

    bars = []
    for place, one in enumerate(result["candidates"][:NUM_SHOWN]):
        colour = _OURS if one["serve"] else _PLAIN
        colour = _BEST if place == result["recommended"] else colour
        label = one["name"].removeprefix("tinfer serve MODEL ")
        bars.append((label, one["rate_rps"] or 0.0, colour))
    title = f"{options.source.name} on {options.num_gpus} GPUs"
    words = f"highest rate with {100 * options.share:g} % good answers (requests/s)"
    return draw_bars(title, words, bars, folder / "plan.png")


def parse_sweep(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`NAME=VALUE,VALUE` words, names as flags or fields. Raises `StartError`."""
    swept = {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        field = name.strip().removeprefix("--").replace("-", "_")
        words = tuple(dict.fromkeys(word.strip() for word in values.split(",") if word.strip()))
        if not equals or not words:
            raise StartError(f"--sweep {pair}: it is NAME=VALUE,VALUE")
        if field in ("prefill", "decode", "tensor_parallel_size", "seed"):
            raise StartError(f"--sweep {pair}: {field} follows from the GPUs")
        swept[field] = words
    return swept
