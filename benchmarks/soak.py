"""A hundred thousand requests to one server of the fake engine: do memory and descriptors rise?

    python -m benchmarks.soak --requests 100000 --seed 1 --json soak.json --plot soak.png

Short requests of every kind, four of five answered to the end; the others are left after a few
events or after a time. Some are wrong and have to be refused. Every answer is compared with the
right one.

The result has `requests`, `requests_per_s`, `verdicts` (see benchmarks/chaos_clients.py; `refused`
is a wrong request that was told so), `cancelled`, `ledger` at the end, and `processes`: of each its
private bytes (USS) after the warm-up, which is the first fifth, and at the end, both as the median
over a tenth of the run; `slope_bytes_per_request` of a line through all in between; and the most
descriptors. `descriptors_with_nobody_connected` are the master's; `samples` has all that was seen.
Exit status 1 if an answer was wrong, the ledger is not zero or a descriptor was left.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos_clients import Asked, Crowd, FakeLoad, asked, judged
from benchmarks.result import heading, unwind_on_sigterm, write
from tests.process.box import Server, running
from tests.process.load import random_prompt
from tinfer.sim.plots import figure, saved
from tinfer.worker.fake_settings import FakeSettings

FAKE = {"num_blocks": 1024, "block_tokens": 16, "mean_output_tokens": 24}
SETTINGS = FakeSettings(num_blocks=1024, block_tokens=16, mean_output_tokens=24)
LONGEST_PROMPT, LONGEST_ANSWER = 64, 32
NUM_CLIENTS = 64
WRONG_SHARE = 0.05
EVERY_S = 1.0
WARM_UP_SHARE, MEDIAN_SHARE = 0.2, 0.1
# Each has to be refused with a status between 400 and 499.
WRONG: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0},
    {"temperature": -1.0},
    {"top_p": 2.0},
    {"model": "no such model"},
    {"logprobs": 10_000},
    {"prompt": []},
    {"stop": [""]},
)


class SoakLoad(FakeLoad):
    """As under chaos, and now and then what cannot be answered."""

    def draw(self, rng: random.Random) -> Asked:
        if rng.random() >= WRONG_SHARE:
            return super().draw(rng)
        body = {"prompt": random_prompt(rng, LONGEST_PROMPT), **rng.choice(WRONG)}
        return asked("/v1/completions", body, "wrong", rng)


class Soak:
    """One run: counts how requests ended, and looks at the processes meanwhile."""

    def __init__(self, server: Server, num_requests: int, seed: int) -> None:
        self._load = SoakLoad(server.settings, LONGEST_PROMPT, LONGEST_ANSWER)
        self._num_requests = num_requests
        self._crowd = Crowd(server.url, self._load, NUM_CLIENTS, seed, self._ended)
        self._processes = {process.pid: process for process in server.process.family()}
        self.names = {server.master.pid: "master"}
        self.verdicts: Counter[str] = Counter()
        self.num_cancelled = 0
        self.samples: list[dict[str, Any]] = []

    @property
    def num_ended(self) -> int:
        return self.verdicts.total()

    async def run(self) -> float:
        """Returns the seconds that it took."""
        started_s = time.monotonic()
        looking = asyncio.create_task(self._look_on(started_s))
        await self._crowd.run()
        looking.cancel()
        await asyncio.wait({looking})
        return time.monotonic() - started_s

    def _ended(self, one: Asked) -> None:
        if one.kind == "wrong":
            is_refused = 400 <= one.status < 500 and bool((one.error or {}).get("message"))
            self.verdicts["refused" if is_refused or one.cancelled else "failed"] += 1
        else:
            verdict = judged(one, self._load)
            self.verdicts[verdict] += 1
            if verdict != "right":
                print(f"{verdict}: {one}", flush=True)
        self.num_cancelled += one.cancelled
        if self.num_ended >= self._num_requests:
            self._crowd.stop()

    async def _look_on(self, started_s: float) -> None:
        while True:
            self.look(time.monotonic() - started_s)
            await asyncio.sleep(EVERY_S)

    def look(self, at_s: float) -> None:
        """Take one sample."""
        sample: dict[str, Any] = {"at_s": round(at_s, 1), "requests": self.num_ended}
        for pid, process in self._processes.items():
            memory = process.memory_full_info()
            name = self.names.get(pid, str(pid))
            sample[name] = [memory.uss, memory.rss, process.num_fds()]
        self.samples.append(sample)


def _named(server: Server, workers: dict[str, dict[str, Any]]) -> dict[int, str]:
    names = {worker["pid"]: name for name, worker in workers.items()}
    (zygote,) = {p.pid for p in server.process.family()} - names.keys() - {server.master.pid}
    return {server.master.pid: "master", zygote: "import process", **names}


def levels(samples: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """What one process held after the warm-up and at the end, and the line in between."""
    settled = samples[int(len(samples) * WARM_UP_SHARE) :]
    width = max(1, int(len(samples) * MEDIAN_SHARE))
    uss = [float(sample[name][0]) for sample in settled]
    requests = [float(sample["requests"]) for sample in settled]
    slope = float(np.polyfit(requests, uss, 1)[0]) if len(settled) > 1 else 0.0
    return {
        "uss_after_warm_up_bytes": int(np.median(uss[:width])),
        "uss_at_the_end_bytes": int(np.median(uss[-width:])),
        "slope_bytes_per_request": round(slope, 3),
        "rss_at_the_end_bytes": samples[-1][name][1],
        "most_descriptors": max(sample[name][2] for sample in samples),
    }


def plotted(samples: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Private memory and descriptors of every process over the requests."""
    made, (memory, descriptors) = figure(8.0, 3.4, columns=2)
    requests = [sample["requests"] / 1000 for sample in samples]
    for name in names:
        memory.plot(requests, [sample[name][0] / (1 << 20) for sample in samples], label=name)
        descriptors.plot(requests, [sample[name][2] for sample in samples], label=name)
    memory.set_ylabel("private memory, MiB")
    descriptors.set_ylabel("open descriptors")
    for axes in (memory, descriptors):
        axes.set_xlabel("thousand requests")
        axes.set_ylim(bottom=0)
    memory.legend(fontsize="small")
    saved(made, path)


async def soaked(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape = {"prefill": 2, "decode": 2, "max_num_seqs": 64}
    with running(folder, FAKE, **shape, route=arguments.route) as server:
        await server.answer()
        before = await server.num_descriptors()
        soak = Soak(server, arguments.requests, arguments.seed)
        soak.names = _named(server, await server.workers())
        seconds = await soak.run()
        await server.idle()
        after = await server.num_descriptors(expected=before)
        ledger = await server.ledger()
        state = await server.state()
        server.stop()
    names = list(soak.names.values())
    if arguments.plot is not None:
        plotted(soak.samples, names, arguments.plot)
    return {
        "requests": soak.num_ended,
        "seconds": round(seconds, 1),
        "requests_per_s": round(soak.num_ended / seconds, 1),
        "verdicts": dict(soak.verdicts),
        "cancelled": soak.num_cancelled,
        "finished_by_the_server": state["num_finished"],
        "ledger": ledger,
        "descriptors_with_nobody_connected": {"before": before, "after": after},
        "processes": {name: levels(soak.samples, name) for name in names},
        "sample_keys": ["uss_bytes", "rss_bytes", "descriptors"],
        "samples": soak.samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--route", choices=["split", "auto", "whole"], default="split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the samples")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="s") as folder:
        found = asyncio.run(soaked(arguments, Path(folder)))
    write({**heading("soak"), **found}, arguments.json)
    for name in ("requests", "requests_per_s", "verdicts", "cancelled", "processes"):
        print(f"{name}: {found[name]}")
    is_right = found["verdicts"].keys() <= {"right", "refused"} and found["ledger"]["idle"]
    num_open = found["descriptors_with_nobody_connected"]
    return 0 if is_right and num_open["after"] <= num_open["before"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
