"""How long the scheduler thinks: the time of one event at 1,000 waiting and 500 running requests.

Eight workers, four of each role, all full: what a worker finishes makes room for what waits. Each
event is timed alone; a *decision* is an event that starts, hands off or refuses a request.

    python benchmarks/scheduler_decisions.py --json scheduler_decisions.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tinfer.core import events as ev
from tinfer.core.lengths import Lengths
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Capacity, LeaseKey, Role, SchedulerConfig

NUM_WORKERS = 8
CAPACITY = Capacity(num_blocks=8000, block_tokens=16, max_num_seqs=256, chunk_tokens=512)
NUM_WAITING, NUM_RUNNING = 1000, 500


class Box:
    """Workers that answer at once, in the order in which they were asked."""

    def __init__(self, config: SchedulerConfig, seed: int) -> None:
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(config)
        self.taken_us: dict[str, list[float]] = defaultdict(list)
        self.prefilling: dict[str, tuple[str, bool]] = {}
        self.decoding: dict[str, str] = {}
        self.steps = [0] * NUM_WORKERS
        self.num_arrived = 0
        self.num_slots = 0
        self.now_s = 0.0
        for number in range(NUM_WORKERS):
            role = Role.PREFILL if number % 2 else Role.DECODE
            self.on(ev.WorkerUp(f"w{number}", 0, role, CAPACITY))

    def on(self, event: ev.Event) -> None:
        began = time.perf_counter()
        actions = self.scheduler.on_event(event, self.now_s)
        taken_us = 1e6 * (time.perf_counter() - began)
        self.taken_us[type(event).__name__].append(taken_us)
        if any(
            isinstance(one, ev.StartPrefill | ev.StartWhole | ev.StartDecode) for one in actions
        ):
            self.taken_us["decision"].append(taken_us)
        for action in actions:
            if isinstance(action, ev.StartPrefill | ev.StartWhole):
                whole = isinstance(action, ev.StartWhole)
                self.prefilling[action.request_id] = (action.worker_id, whole)
            elif isinstance(action, ev.StartDecode):
                self.decoding[action.request_id] = action.worker_id
                self.on(ev.Pulled(action.request_id, action.worker_id, 0, True))
                self.on(ev.LeaseEnded(action.lease))

    def arrive(self) -> None:
        self.num_arrived += 1
        points = sorted(self.rng.randrange(1, 1500) for _ in range(16))
        prompt_tokens = self.rng.choice((20, 100, 500, 1500, 4000))
        self.on(
            ev.Arrived(
                f"r{self.num_arrived}",
                prompt_tokens,
                2000,
                lengths=Lengths(tuple(points)),
                block_hashes=tuple(self.rng.getrandbits(60) for _ in range(prompt_tokens // 16)),
            )
        )

    def end_prefill(self) -> None:
        if not self.prefilling:
            return
        rid = next(iter(self.prefilling))
        worker_id, whole = self.prefilling.pop(rid)
        if whole:
            self.decoding[rid] = worker_id
            self.on(ev.FirstToken(rid, worker_id, 0))
        else:
            self.num_slots += 1
            self.on(ev.Prefilled(rid, worker_id, 0, LeaseKey(worker_id, 0, self.num_slots, 0), 40))

    def end_decode(self) -> None:
        rid = self.rng.choice(list(self.decoding))
        self.on(ev.WorkerFinished(rid, self.decoding.pop(rid), 0, answered=True))

    def step(self) -> None:
        for number in range(NUM_WORKERS):
            self.steps[number] += 1
            num = self.steps[number]
            self.on(ev.Stepped(f"w{number}", 0, num, 0.03 * num, 100 * num, 4000))
        self.now_s += 0.03


def run(config: SchedulerConfig, num_rounds: int, seed: int) -> dict[str, Any]:
    """Fill the box, then keep it full and time what happens."""
    box = Box(config, seed)
    while len(box.decoding) < NUM_RUNNING:
        box.arrive()
        box.end_prefill()
        if not box.num_arrived % 50:
            box.step()
    while sum(1 for _ in box.scheduler.waiting(0.0, 10**6)) < NUM_WAITING:
        box.arrive()
    box.taken_us.clear()
    gc.collect()
    gc.freeze()
    for _ in range(num_rounds):
        box.arrive()
        box.step()
        box.end_decode()
        box.end_prefill()
    gc.unfreeze()
    return {
        name: {
            "num": len(taken),
            "median_us": round(statistics.median(taken), 1),
            "p99_us": round(statistics.quantiles(taken, n=100)[98], 1),
            "max_us": round(max(taken), 1),
        }
        for name, taken in sorted(box.taken_us.items())
        if len(taken) > 1
    }


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    results = {}
    for route in ("auto", "split"):
        config = SchedulerConfig(route=route, max_num_queued_reqs=10**6)
        results[route] = run(config, arguments.rounds, arguments.seed)
        for name, figures in results[route].items():
            print(f"{route:<6} {name:<15} {figures}")
    if arguments.json:
        report = {
            "benchmark": "scheduler_decisions",
            "command": f"python benchmarks/scheduler_decisions.py --rounds {arguments.rounds}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "num_workers": NUM_WORKERS,
            "num_waiting": NUM_WAITING,
            "num_running": NUM_RUNNING,
            "results": results,
        }
        json.dump(report, arguments.json, indent=2)


if __name__ == "__main__":
    main()
