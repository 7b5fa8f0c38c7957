"""The same requests on this box's real server and in the simulator, which knows the box from
`tinfer tune`.

    tinfer tune MODEL --cpu-threads 1 --json tuning.json
    python -m benchmarks.sim_reality MODEL --tuned tuning.json --rates 1 2 \\
        --serve "--cpu-threads 1" --json sim_reality.json

One server; then, for each rate and each of `--repetitions` seeds, `tinfer bench serve` sends it the
workload, and `tinfer simulate` is asked about the same one. `--policy` goes to the server and to
the simulator, `--serve` (data type, threads, memory: what `tune` was given too) to the server
alone.

The result has `points`, one per rate: `rate_rps`; `runs`, with `seed`, `routes` (how many requests
went which way) of both, and of each figure `real`, `simulated` and `ratio`, the simulated over the
real; and `ratios`, which are of the means over all runs. Figures are named as those of
`tinfer bench serve`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import heading, unwind_on_sigterm, write
from tests.e2e.serving import serving

FIGURES = (
    *("mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_itl_ms"),
    *("mean_e2el_ms", "median_e2el_ms", "p99_e2el_ms", "request_throughput"),
)
# By these the simulator is right or wrong; the others say where.
JUDGED = ("mean_ttft_ms", "mean_e2el_ms")


def asked(arguments: argparse.Namespace, rate_rps: float, seed: int) -> list[str]:
    """The requests, in words that both commands know."""
    words = ["--workload", arguments.workload, "--num-prompts", str(arguments.num_requests)]
    words += ["--request-rate", str(rate_rps), "--seed", str(seed)]
    words += ["--length-scale", str(arguments.length_scale)]
    for name in ("max_prompt_tokens", "max_output_tokens"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def tinfer(words: Sequence[str]) -> dict[str, Any]:
    """What a command of tinfer reports. Raises `CalledProcessError` where it fails."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        path = Path(folder, "result.json")
        subprocess.run(
            [sys.executable, "-m", "tinfer", *words, "--json", str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return dict(json.loads(path.read_bytes()))


def real(url: str, words: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Figures and routes of the server."""
    metrics = ["--percentile-metrics", "ttft,tpot,itl,e2el", "--save-detailed", "--trace"]
    found = tinfer(["bench", "serve", "--base-url", url, *metrics, *words])
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests failed")
    routes = Counter(str(one["route"]) for one in found["records"])
    return {name: float(found[name]) for name in FIGURES}, dict(sorted(routes.items()))


def simulated(tuned: Path, words: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Figures and routes of the simulator."""
    arm = tinfer(["simulate", "--tuned", str(tuned), *words])["arms"]["tinfer"]
    return {name: float(arm["figures"][name]) for name in FIGURES}, arm["routes"]


def beside(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By figure: what is real, what is simulated, and the second over the first."""
    return {
        name: {
            "real": round(theirs[name], 3),
            "simulated": round(ours[name], 3),
            "ratio": round(ours[name] / theirs[name], 4),
        }
        for name in FIGURES
    }


def ratios(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the means over all runs."""
    return {
        name: round(
            statistics.fmean(run["figures"][name]["simulated"] for run in runs)
            / statistics.fmean(run["figures"][name]["real"] for run in runs),
            4,
        )
        for name in FIGURES
    }


def point(arguments: argparse.Namespace, url: str, rate_rps: float) -> dict[str, Any]:
    """One rate, all seeds."""
    runs = []
    for seed in range(arguments.seed, arguments.seed + arguments.repetitions):
        words = asked(arguments, rate_rps, seed)
        theirs, their_routes = real(url, words)
        ours, our_routes = simulated(arguments.tuned, [*words, *shlex.split(arguments.policy)])
        figures = beside(ours, theirs)
        routes = {"real": their_routes, "simulated": our_routes}
        runs.append({"seed": seed, "routes": routes, "figures": figures})
        said = ", ".join(f"{name} {figures[name]}" for name in JUDGED)
        print(f"{rate_rps:g}/s, seed {seed}: {said}", flush=True)
    return {"rate_rps": rate_rps, "runs": runs, "ratios": ratios(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.splitlines()[:2]))
    parser.add_argument("model", help="as for `tinfer serve`")
    parser.add_argument("--tuned", type=Path, required=True, help="of `tinfer tune --json`")
    parser.add_argument("--workload", default="Mixed")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="requests/s")
    parser.add_argument("--num-requests", type=int, default=200, help="of each run")
    parser.add_argument("--length-scale", type=float, default=1.0)
    parser.add_argument("--max-prompt-tokens", type=int)
    parser.add_argument("--max-output-tokens", type=int)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--policy", default="", help="options of server and simulator, as one word")
    parser.add_argument("--serve", default="", help="options of the server alone, as one word")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    flags = [arguments.model, *shlex.split(arguments.serve), *shlex.split(arguments.policy)]
    with tempfile.TemporaryDirectory(prefix="r") as folder, serving(Path(folder), *flags) as server:
        points = [point(arguments, server.url, rate_rps) for rate_rps in arguments.rates]
    write({**heading("sim_reality"), "points": points}, arguments.json)
    for one in points:
        print(f"{one['rate_rps']:g}/s: " + ", ".join(f"{n} {one['ratios'][n]}" for n in JUDGED))


if __name__ == "__main__":
    main()
