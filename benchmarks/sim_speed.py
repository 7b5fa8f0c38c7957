"""How many request lifecycles the simulator gets through per minute on one core, core included.

    python benchmarks/sim_speed.py --num-requests 2000 --json benchmarks/results/sim_speed.json
    python benchmarks/sim_speed.py --profile

A lifecycle is one request from arrival to its last token, through tinfer's own scheduler and two to
eight simulated workers. Reported is processor time, so other work on the box does not count.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinfer.core.types import SchedulerConfig
from tinfer.sim import SimSpec, figures_of, presets, sim_requests, simulate
from tinfer.workloads import WorkloadSpec, make

TARGET_PER_MINUTE = 50_000
# (workload, requests per second and worker pair, engine): about 80 % of what two workers can do.
CASES = (
    ("Mixed", 0.9, "paper"),
    ("LPHD", 0.6, "paper"),
    ("azure-conversation", 14.0, "gpu-estimate"),
    ("multi-tenant", 6.0, "gpu-estimate"),
)


def specs(num_requests: int, num_workers: list[int]) -> Iterator[tuple[dict[str, Any], SimSpec]]:
    """Every case at every size, with what it is."""
    for name, rate_rps, engine_name in CASES:
        engine = presets.ENGINES[engine_name]
        for num in num_workers:
            workload = WorkloadSpec(
                name=name,
                num_requests=num_requests,
                rate_rps=rate_rps * num / 2,
                max_prompt_tokens=4096,
            )
            requests = sim_requests(make(workload), engine.block_tokens)
            for route in ("split", "auto"):
                case = {"workload": name, "engine": engine_name, "workers": num, "route": route}
                yield (
                    case,
                    SimSpec(
                        workers=presets.workers(engine, num // 2, engine, num // 2),
                        requests=requests,
                        scheduler=SchedulerConfig(route=route),
                    ),
                )


def measure(spec: SimSpec) -> dict[str, float]:
    """Lifecycles per minute of processor time, the figures of the run included."""
    start_s = time.process_time()
    run = simulate(spec)
    figures = figures_of(run)
    taken_s = time.process_time() - start_s
    return {
        "cpu_s": taken_s,
        "lifecycles_per_minute": 60.0 * len(spec.requests) / taken_s,
        "simulated_s": run.duration_s,
        "mean_e2el_ms": figures["mean_e2el_ms"],
        "num_failed": figures["num_failed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument(
        "--profile", action="store_true", help="show where the first case's time goes"
    )
    arguments = parser.parse_args()
    if arguments.profile:
        _, spec = next(specs(arguments.num_requests, arguments.workers))
        profile = cProfile.Profile()
        profile.runcall(simulate, spec)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    cases = []
    for case, spec in specs(arguments.num_requests, arguments.workers):
        measured = measure(spec)
        cases.append({**case, **measured})
        words = "{workload:<20} {engine:<13} {workers} workers  {route:<6}".format(**case)
        print(f"{words} {measured['lifecycles_per_minute']:>9,.0f} lifecycles per minute")
    slowest = min(case["lifecycles_per_minute"] for case in cases)
    print(f"slowest: {slowest:,.0f} per minute; the aim is {TARGET_PER_MINUTE:,}")
    if arguments.json:
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"python benchmarks/sim_speed.py --num-requests {arguments.num_requests}",
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "target_per_minute": TARGET_PER_MINUTE,
            "cases": cases,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
