"""How long the scheduler thinks: the time of one event at 1,000 waiting and 500 running requests.

Eight workers, four of each role. Their KV caches hold little more than 500 running requests may
need, so that admission has to count; the numbers are held by letting one request arrive, one
prefill end and one answer end in every round. Each event is timed alone; a *decision* is an event
that starts a request or hands one off.

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
NUM_WAITING, NUM_RUNNING = 1000, 500
# More arrivals than that and still fewer running: the workers are too small, say so.
MOST_ARRIVALS = 10_000
# With `split`, half of the workers hold all that decodes.
NUM_BLOCKS = {"auto": 11_000, "split": 22_000}
CHUNK_TOKENS = 512
PROMPT_TOKENS = (20, 100, 500, 1500, 4000)
MOST_OUTPUT_TOKENS = 1500


class Box:
    """Workers that answer at once, in the order in which they were asked."""

    def __init__(self, route: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(SchedulerConfig(route=route, max_num_queued_reqs=10**6))
        self.taken_us: dict[str, list[float]] = defaultdict(list)
        self.prompt_tokens: dict[str, int] = {}
        self.prefilling: dict[str, tuple[str, bool]] = {}
        self.decoding: dict[str, str] = {}
        self.num_steps = self.num_arrived = self.num_slots = 0
        self.now_s = 0.0
        capacity = Capacity(NUM_BLOCKS[route], 16, max_num_seqs=256, chunk_tokens=CHUNK_TOKENS)
        for number in range(NUM_WORKERS):
            role = Role.PREFILL if number % 2 else Role.DECODE
            self.on(ev.WorkerUp(f"w{number}", 0, role, capacity))

    @property
    def num_waiting(self) -> int:
        """Requests that have not started, and those between their two workers."""
        num_open = self.scheduler.ledger_snapshot().open_requests
        return num_open - len(self.prefilling) - len(self.decoding)

    def on(self, event: ev.Event) -> None:
        began = time.perf_counter()
        actions = self.scheduler.on_event(event, self.now_s)
        taken_us = 1e6 * (time.perf_counter() - began)
        self.taken_us[named(event)].append(taken_us)
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
        rid, prompt_tokens = f"r{self.num_arrived}", self.rng.choice(PROMPT_TOKENS)
        self.prompt_tokens[rid] = prompt_tokens
        points = sorted(self.rng.randrange(1, MOST_OUTPUT_TOKENS) for _ in range(16))
        hashes = tuple(self.rng.getrandbits(60) for _ in range(prompt_tokens // 16))
        lengths = Lengths(tuple(points))
        self.on(ev.Arrived(rid, prompt_tokens, 2000, lengths=lengths, block_hashes=hashes))

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
            num_blocks = self.prompt_tokens[rid] // 16 + 1
            lease = LeaseKey(worker_id, 0, self.num_slots, 0)
            self.on(ev.Prefilled(rid, worker_id, 0, lease, num_blocks))

    def end_decode(self) -> None:
        rid = self.rng.choice(list(self.decoding))
        self.on(ev.WorkerFinished(rid, self.decoding.pop(rid), 0, answered=True))

    def step(self) -> None:
        """One step of each worker; where a prompt longer than a chunk computes, one chunk of it."""
        self.num_steps += 1
        num = self.num_steps
        computing = {
            worker_id: rid
            for rid, (worker_id, _) in reversed(self.prefilling.items())
            if self.prompt_tokens[rid] > CHUNK_TOKENS
        }
        for number in range(NUM_WORKERS):
            worker_id = f"w{number}"
            rid = computing.get(worker_id)
            progress = () if rid is None else ((rid, CHUNK_TOKENS),)
            self.on(ev.Stepped(worker_id, 0, num, 0.03 * num, 100 * num, 4000, progress))
        self.now_s += 0.03


def named(event: ev.Event) -> str:
    name = type(event).__name__
    return f"{name}, progress" if isinstance(event, ev.Stepped) and event.progress else name


def fill(box: Box) -> None:
    """Raises `RuntimeError` where the workers cannot hold what is to run."""
    while len(box.decoding) < NUM_RUNNING or box.num_waiting < NUM_WAITING:
        if box.num_arrived >= MOST_ARRIVALS:
            raise RuntimeError(
                f"{len(box.decoding)} of {NUM_RUNNING} requests run and {box.num_waiting} of "
                f"{NUM_WAITING} wait after {box.num_arrived} arrivals: the workers are too small"
            )
        box.arrive()
        if len(box.decoding) < NUM_RUNNING:
            box.end_prefill()
        if not box.num_arrived % 50:
            box.step()


def run(route: str, num_rounds: int, seed: int) -> dict[str, Any]:
    """Fill the box, then keep it full and time what happens."""
    box = Box(route, seed)
    fill(box)
    box.taken_us.clear()
    gc.collect()
    gc.freeze()
    for _ in range(num_rounds):
        box.arrive()
        box.step()
        box.end_decode()
        box.end_prefill()
        box.on(ev.Tick())
    gc.unfreeze()
    return {
        "num_blocks_per_worker": NUM_BLOCKS[route],
        "num_waiting_at_end": box.num_waiting,
        "num_running_at_end": len(box.decoding),
        "events": {name: figures(taken) for name, taken in sorted(box.taken_us.items())},
    }


def figures(taken_us: list[float]) -> dict[str, float]:
    """Of the times of one kind of event; the median bounds what a busy machine adds to it."""
    return {
        "num": len(taken_us),
        "min_us": round(min(taken_us), 1),
        "median_us": round(statistics.median(taken_us), 1),
        "p99_us": round(sorted(taken_us)[int(0.99 * len(taken_us))], 1),
        "max_us": round(max(taken_us), 1),
    }


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--route", choices=sorted(NUM_BLOCKS), action="append")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    results = {}
    for route in arguments.route or sorted(NUM_BLOCKS):
        results[route] = run(route, arguments.rounds, arguments.seed)
        for name, of_event in results[route]["events"].items():
            print(f"{route:<6} {name:<18} {of_event}")
    if arguments.json:
        command = f"--rounds {arguments.rounds} --seed {arguments.seed}"
        report = {
            "benchmark": "scheduler_decisions",
            "command": f"python benchmarks/scheduler_decisions.py {command}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "num_workers": NUM_WORKERS,
            "num_waiting": NUM_WAITING,
            "num_running": NUM_RUNNING,
            "results": results,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
