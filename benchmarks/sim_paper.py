"""The paper's table and figures 16, 18 and 19 in the simulator, beside what it published.

Requests, engines and modes are in tinfer/sim/paper.py. Every row is over some seeds (draws of the
one length model), with the 95 % interval of the mean; changes are paired by seed. Cells that are
scored and lie outside are listed first; where the time goes and two variants of the prefill worker
tell why. Reading of 2026-11-21: its text merges light prompts into chunks, and then 128 of them are
prefilled in 1.3 s; the published LPLD needs about 10 s, 78 ms each. A pass per prompt takes 37 ms;
with 41 ms more LPLD comes out as published, and LPHD's resource time too, but HPLD's resource time
would be near twice its vLLM's: no one cost of a pass gives both, so none is chosen.

    python benchmarks/sim_paper.py --json sim_paper.json --plot plots

The result has `setting` and `seeds`, and

- `cells`: of the table, one per workload and figure, changes in percent against the paper's vLLM:
  `published` and `simulated`, their `distance` in points, whether it is `scored` and `inside`;
  what would be as published (`implied`) and was `found`, in ms or device-seconds; `replicas` and
  `auto` likewise, `to_replicas` the paper's modes against replicas, `explained` the variants;
- `changes` (figure 16) and `admission` (figure 18): `published` and `simulated` changes;
- `arms`: by experiment, case and arm the mean of every figure of `tinfer/sim/results.py`, of
  `makespan_s`, `last_first_token_s` and `split_share`, of where requests spend their time, and of
  heavy and light answers on the worker with the most heavy ones.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec import Struct, to_builtins

import tinfer
from tinfer.core.lengths import HEAVY_TOKENS
from tinfer.master.scheduling import scheduler_config
from tinfer.sim import paper
from tinfer.sim.arms import run_arm
from tinfer.sim.paired import Estimate, mean_of
from tinfer.sim.parallel import default_jobs, done_in_parallel
from tinfer.sim.plots import figure, saved
from tinfer.sim.report import encoded, number, table
from tinfer.sim.results import SimRun, figures_of
from tinfer.sim.spec import SimRequest

METRICS = {"ttft": "mean_ttft_ms", "e2el": "mean_e2el_ms", "resource": "resource_s"}
TETRI_WORDS = "as its text says"
UNITS = {"ttft": "ms", "e2el": "ms", "resource": "device-s"}
WORDS = {"ttft": "TTFT", "e2el": "JCT", "resource": "resource"}
ADMISSION_WORKLOADS = ("LPHD", "Mixed")
TABLE, ORDERS, ADMISSIONS, CHOICES = "table", "figure 16", "figure 18", "figure 19"


class Task(Struct, frozen=True, kw_only=True):
    """One draw of one experiment: all of its arms on the same requests."""

    experiment: str
    case: str
    seed: int
    setting: paper.Setting


# By arm: figures and what its trace shows.
Done = dict[str, dict[str, float]]


def tasks_of(seeds: Sequence[int], setting: paper.Setting) -> list[Task]:
    cases = {
        TABLE: list(paper.HEADLINE),
        ORDERS: ["Mixed"],
        ADMISSIONS: list(ADMISSION_WORKLOADS),
        CHOICES: [str(num) for num in paper.NUMS_OF_DECODE],
    }
    return [
        Task(experiment=experiment, case=case, seed=seed, setting=setting)
        for experiment, of_it in cases.items()
        for case in of_it
        for seed in seeds
    ]


def simulated(task: Task) -> Done:
    """All arms of one task."""
    requests, arms = _requests(task), _arms(task)
    return {arm.name: traced(run_arm(arm, requests, task.seed)) for arm in arms}


def _requests(task: Task) -> tuple[SimRequest, ...]:
    match task.experiment:
        case "table":
            return paper.requests_of(task.case, paper.NUM_REQUESTS[task.case], task.seed)
        case "figure 16":
            return paper.requests_of(task.case, paper.NUM_REQUESTS[task.case], task.seed)
        case "figure 18":
            return paper.requests_of(task.case, paper.NUM_ADMISSION_REQUESTS, task.seed)
        case _:
            return paper.dispatch_requests(int(task.case), task.seed)


def _arms(task: Task) -> Sequence[Any]:
    match task.experiment:
        case "table":
            return paper.headline_arms(task.setting, task.seed, scheduler_config)
        case "figure 16":
            return paper.order_arms(task.setting, task.seed)
        case "figure 18":
            return paper.admission_arms(task.setting, task.seed)
        case _:
            return paper.choice_arms(task.setting, task.seed, int(task.case))


def traced(run: SimRun) -> dict[str, float]:
    """The figures of a run, and where its requests' time went, in seconds."""
    whole = [one for one in run.requests if one.ok]
    figures = figures_of(run)
    figures["makespan_s"] = run.duration_s
    figures["last_first_token_s"] = max(one.first_token_s or 0.0 for one in whole)
    figures["wait_s"] = fmean((one.started_s or 0.0) - one.arrival_s for one in whole)
    figures["prefill_s"] = fmean(
        (one.first_token_s or 0.0) - (one.started_s or 0.0) for one in whole
    )
    figures["handoff_s"] = fmean(one.handoff_s or 0.0 for one in whole)
    figures["decode_s"] = fmean(
        (one.last_token_s or 0.0) - (one.first_token_s or 0.0) - (one.handoff_s or 0.0)
        for one in whole
    )
    figures["split_share"] = sum(one.route == "split" for one in whole) / max(1, len(whole))
    heavy = Counter(one.workers[-1] for one in whole if one.output_tokens > HEAVY_TOKENS)
    slowest, figures["most_heavy"] = max(heavy.items(), key=itemgetter(1), default=("", 0))
    figures["light_beside"] = sum(
        one.workers[-1] == slowest and one.output_tokens <= HEAVY_TOKENS for one in whole
    )
    return figures


# --- what is reported ----------------------------------------------------------------------------


def report_of(pairs: Sequence[tuple[Task, Done]]) -> dict[str, Any]:
    """Everything but date and machine; draws are paired by their place in the seeds."""
    by_case: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    for task, done in sorted(pairs, key=lambda pair: (pair[0].seed, pair[0].case)):
        arms = by_case.setdefault(task.experiment, {}).setdefault(task.case, {})
        for arm, figures in done.items():
            arms.setdefault(arm, []).append(figures)
    cells = [cell for case, arms in by_case.get(TABLE, {}).items() for cell in _cells(case, arms)]
    return {
        "cells": sorted(cells, key=lambda one: list(paper.HEADLINE).index(one["workload"])),
        "arms": {
            experiment: {case: _means(arms) for case, arms in cases.items()}
            for experiment, cases in by_case.items()
        },
        "changes": _changes(by_case.get(ORDERS, {}).get("Mixed", {})),
        "admission": _admission(by_case.get(ADMISSIONS, {})),
    }


def change(
    mine: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], metric: str
) -> Estimate:
    """The change in percent, the mean over draws of each draw's."""
    return mean_of(
        [100.0 * (a[metric] / b[metric] - 1.0) for a, b in zip(mine, theirs, strict=True)]
    )


def _cells(workload: str, arms: Mapping[str, list[dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """The paper's system and the two others against its vLLM; and it against plain replicas."""
    published = paper.HEADLINE[workload]
    for name, metric in METRICS.items():
        ours = change(arms[paper.TETRI], arms[paper.VLLM], metric)
        theirs = getattr(published, name)
        is_scored = name in published.scored
        base = fmean(one[metric] for one in arms[paper.VLLM])
        yield {
            "workload": workload,
            "metric": name,
            "published": theirs,
            "simulated": to_builtins(ours),
            "distance": None if theirs is None else ours.value - theirs,
            "scored": is_scored,
            "points": published.points,
            "inside": None if not is_scored else abs(ours.value - theirs) <= published.points,
            "implied": None if theirs is None else base * (1.0 + theirs / 100.0),
            "found": fmean(one[metric] for one in arms[paper.TETRI]),
            "replicas": to_builtins(change(arms[paper.REPLICAS], arms[paper.VLLM], metric)),
            "auto": to_builtins(change(arms[paper.AUTO], arms[paper.VLLM], metric)),
            "to_replicas": to_builtins(change(arms[paper.TETRI], arms[paper.REPLICAS], metric)),
            "explained": {
                arm: to_builtins(change(arms[arm], arms[paper.VLLM], metric))
                for arm in (paper.UNMERGED, paper.UNMERGED_SLOWER)
            },
        }


def _means(arms: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    return {
        arm: {name: to_builtins(mean_of([one[name] for one in draws])) for name in draws[0]}
        for arm, draws in arms.items()
    }


def _changes(arms: Mapping[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """What the paper says of figure 16."""
    if not arms:
        return []
    return [
        {
            "arm": mine,
            "to": theirs,
            "published": published,
            "simulated": to_builtins(change(arms[mine], arms[theirs], "mean_ttft_ms")),
        }
        for (mine, theirs), published in paper.FIGURE_16.items()
    ]


def _admission(cases: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> list[dict[str, Any]]:
    """Figure 18: every policy against greedy under the same prediction."""
    rows = []
    for workload, arms in cases.items():
        for prediction in paper.PREDICTIONS:
            greedy = arms[f"greedy/{prediction}"]
            for admission in paper.ADMISSIONS:
                mine = arms[f"{admission}/{prediction}"]
                published = paper.FIGURE_18_S.get((admission, prediction))
                base = paper.FIGURE_18_S["greedy", prediction]
                rows.append(
                    {
                        "workload": workload,
                        "prediction": prediction,
                        "admission": admission,
                        "published": None if published is None else 100 * (published / base - 1),
                        "simulated": to_builtins(change(mine, greedy, "mean_e2el_ms")),
                    }
                )
    return rows


# --- as text -------------------------------------------------------------------------------------


def text(report: Mapping[str, Any]) -> Iterator[str]:
    scored = [cell for cell in report["cells"] if cell["scored"]]
    outside = [cell for cell in scored if not cell["inside"]]
    yield f"scored cells within their points: {len(scored) - len(outside)} of {len(scored)}"
    for cell in outside:
        yield f"  outside: {cell['workload']} {WORDS[cell['metric']]} {_told(cell)}"
    yield ""
    yield "change against the paper's vLLM, percent; ours is the paper's modes in the simulator"
    yield from table(_table_rows(report["cells"]))
    yield ""
    yield "if prompts were not merged into chunks (and passes took 41 ms longer), not scored"
    yield from table(_explained_rows(report["cells"]))
    yield ""
    yield "where the time goes, seconds per request"
    yield from table(_trace_rows(report["arms"].get(TABLE, {})))
    yield ""
    yield "figure 16: prefill policies on Mixed"
    yield from table(_arm_rows(report["arms"][ORDERS], ("mean_ttft_ms", "wait_s", "mean_e2el_ms")))
    for row in report["changes"]:
        published = f"published {row['published']:+.1f} %"
        yield f"  {row['arm']} to {row['to']}: {_points(row['simulated'])}, {published}"
    yield ""
    yield "figure 18: decode admission, change of mean JCT against greedy"
    yield from table(_admission_rows(report["admission"]))
    keys = ("mean_e2el_ms", "makespan_s", "num_preemptions")
    yield from table(_arm_rows(report["arms"][ADMISSIONS], keys))
    yield ""
    yield "figure 19: decode workers, seconds until all is decoded"
    yield from table(_choice_rows(report["arms"][CHOICES], "makespan_s", paper.FIGURE_19_S))
    yield "mean JCT in ms"
    yield from table(_choice_rows(report["arms"][CHOICES], "mean_e2el_ms", {}))
    yield "heavy decodes on the worker with the most of them, and light ones beside"
    yield from table(_beside_rows(report["arms"][CHOICES]))


def _told(cell: Mapping[str, Any]) -> str:
    published = f"published {cell['published']:+.0f} %, {cell['points']:g} points allowed"
    told = f"{number(cell['found'])} where {number(cell['implied'])} {UNITS[cell['metric']]}"
    return f"{_points(cell['simulated'])}, {published}: {told} would be as published"


def _points(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return f"{one['value']:+.1f} %"
    return f"{one['value']:+.1f} % [{one['low']:+.1f}, {one['high']:+.1f}]"


def _table_rows(cells: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head = [
        "workload",
        "figure",
        "paper",
        "ours",
        "off by",
        "",
        "replicas",
        "auto",
        "ours to replicas",
    ]
    rows = [head]
    for cell in cells:
        published = "-" if cell["published"] is None else f"{cell['published']:+.0f} %"
        distance = "-" if cell["distance"] is None else f"{cell['distance']:+.1f}"
        verdict = {True: "ok", False: "OUTSIDE", None: "(not scored)"}[cell["inside"]]
        others = [_points(cell[key]) for key in ("replicas", "auto", "to_replicas")]
        mine = _points(cell["simulated"])
        words = WORDS[cell["metric"]]
        rows.append([cell["workload"], words, published, mine, distance, verdict, *others])
    return rows


def _explained_rows(cells: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    variants = [TETRI_WORDS, paper.UNMERGED, paper.UNMERGED_SLOWER]
    rows = [["workload", "figure", "paper", *variants]]
    for cell in cells:
        published = "-" if cell["published"] is None else f"{cell['published']:+.0f} %"
        ours = [cell["simulated"], *cell["explained"].values()]
        shown = [f"{one['value']:+.1f} %" for one in ours]
        rows.append([cell["workload"], WORDS[cell["metric"]], published, *shown])
    return rows


def _trace_rows(cases: Mapping[str, Any]) -> list[list[str]]:
    keys = ["wait_s", "prefill_s", "handoff_s", "decode_s", "last_first_token_s", "makespan_s"]
    keys += ["mean_tpot_ms", "num_preemptions", "resource_s"]
    rows = [["workload", "arm", *keys]]
    for workload in paper.HEADLINE:
        for arm, figures in cases.get(workload, {}).items():
            rows.append([workload, arm, *(f"{figures[key]['value']:.3g}" for key in keys)])
    return rows


def _arm_rows(cases: Mapping[str, Any], keys: Sequence[str]) -> list[list[str]]:
    rows = [["workload", "arm", *keys]]
    for case, arms in cases.items():
        for arm, figures in arms.items():
            rows.append([case, arm, *(_interval(figures[key]) for key in keys)])
    return rows


def _interval(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return f"{one['value']:.4g}"
    return f"{one['value']:.4g} [{one['low']:.4g}, {one['high']:.4g}]"


def _admission_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["workload", "prediction", "admission", "paper", "ours"]]
    for one in found:
        published = "-" if one["published"] is None else f"{one['published']:+.1f} %"
        words = [one["workload"], one["prediction"], one["admission"]]
        rows.append([*words, published, _points(one["simulated"])])
    return rows


def _choice_rows(
    cases: Mapping[str, Any], metric: str, published: Mapping[tuple[str, int], float]
) -> list[list[str]]:
    nums = list(paper.NUMS_OF_DECODE)
    rows = [["", *(f"{num} decode workers" for num in nums), *(["paper"] if published else [])]]
    for arm in cases[str(nums[0])]:
        mine = [_interval(cases[str(num)][arm][metric]) for num in nums]
        theirs = [number(published.get((arm, num))) for num in nums]
        rows.append([arm, *mine, *([" / ".join(theirs)] if published else [])])
    return rows


def _beside_rows(cases: Mapping[str, Any]) -> list[list[str]]:
    nums = list(paper.NUMS_OF_DECODE)
    rows = [["", *(f"{num} decode workers" for num in nums)]]
    for arm in cases[str(nums[0])]:
        mine = [cases[str(num)][arm] for num in nums]
        keys = ("most_heavy", "light_beside")
        rows.append(
            [arm, *(" / ".join(f"{one[key]['value']:.1f}" for key in keys) for one in mine)]
        )
    return rows


# --- as a picture --------------------------------------------------------------------------------


def draw(report: Mapping[str, Any], folder: Path) -> Path:
    """The table's cells, and the three figures."""
    folder.mkdir(parents=True, exist_ok=True)
    made, (cells, orders, admissions, choices) = figure(15.0, 10.0, rows=2, columns=2)
    labels = [f"{cell['workload']} {WORDS[cell['metric']]}" for cell in report["cells"]]
    places = range(len(labels))
    ours = [cell["simulated"] for cell in report["cells"]]
    cells.barh(places, [one["value"] for one in ours], xerr=_errors(ours), height=0.6)
    known = [i for i in places if report["cells"][i]["published"] is not None]
    theirs = [report["cells"][i]["published"] for i in known]
    cells.plot(theirs, known, "k|", markersize=14, markeredgewidth=2, label="published")
    cells.set_yticks(list(places), labels)
    cells.invert_yaxis()
    cells.set_xlabel("change against the paper's vLLM (%)")
    cells.legend()
    _bars(
        orders, report["arms"][ORDERS]["Mixed"], "mean_ttft_ms", "figure 16: mean TTFT (ms), Mixed"
    )
    workload = ADMISSION_WORKLOADS[0]
    title = f"figure 18: mean JCT (ms), {workload}"
    _bars(admissions, report["arms"][ADMISSIONS][workload], "mean_e2el_ms", title)
    for arm in report["arms"][CHOICES][str(paper.NUMS_OF_DECODE[0])]:
        values = [report["arms"][CHOICES][str(n)][arm]["makespan_s"] for n in paper.NUMS_OF_DECODE]
        heights = [one["value"] for one in values]
        choices.errorbar(paper.NUMS_OF_DECODE, heights, _errors(values), marker="o", label=arm)
    choices.set_title("figure 19: seconds until all is decoded")
    choices.set_xlabel("decode workers")
    choices.set_ylim(bottom=0)
    choices.legend(fontsize="small")
    for axes in (cells, orders, admissions, choices):
        axes.grid(alpha=0.3)
    return saved(made, folder / "sim_paper.png")


def _bars(axes: Any, arms: Mapping[str, Any], metric: str, title: str) -> None:
    values = [figures[metric] for figures in arms.values()]
    axes.barh(range(len(values)), [one["value"] for one in values], xerr=_errors(values))
    axes.set_yticks(range(len(values)), list(arms), fontsize="small")
    axes.invert_yaxis()
    axes.set_title(title)


def _errors(values: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    lows = [one["value"] if one["low"] is None else one["low"] for one in values]
    highs = [one["value"] if one["high"] is None else one["high"] for one in values]
    return [
        [one["value"] - low for one, low in zip(values, lows, strict=True)],
        [high - one["value"] for one, high in zip(values, highs, strict=True)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="draws of every experiment")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--predictor-tax", type=float, default=paper.PREDICTOR_TAX)
    parser.add_argument("--jobs", type=int, default=default_jobs())
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="draw into this folder")
    given = parser.parse_args()
    setting = paper.Setting(predictor_tax=given.predictor_tax)
    tasks = tasks_of(range(given.seed, given.seed + given.seeds), setting)
    started_s = time.monotonic()
    done = done_in_parallel(simulated, tasks, given.jobs, "draws", show_progress=True)
    report = report_of([(tasks[place], one) for place, one in done])
    print("\n".join(text(report)))
    if given.json is not None:
        head = {
            "date": time.strftime("%Y-%m-%d"),
            "version": tinfer.__version__,
            "python": platform.python_version(),
            "wall_s": round(time.monotonic() - started_s, 1),
            "seeds": given.seeds,
            "setting": setting,
        }
        given.json.write_bytes(encoded({**head, **report}))
    if given.plot is not None:
        print(draw(report, given.plot))


if __name__ == "__main__":
    main()
