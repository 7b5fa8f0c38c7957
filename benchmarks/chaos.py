"""Kills, hangs and pauses of workers at every phase of a request, under load: what clients see.

    python -m benchmarks.chaos --engine fake --kills 200 --seed 1 --json chaos_fake.json
    python -m benchmarks.chaos --engine vllm --kills 24 --seed 1 --json chaos_vllm.json
    python -m benchmarks.chaos --engine vllm --dtype bfloat16 --kills 24 --seed 1 --json ...

Servers follow each other, each struck `--kills-per-server` times (the back-off between restarts
doubles with every death in a row), at a phase of some request that is looked for in the event log:
queued, prefilling, waiting for a decode worker (handoff), its blocks being copied, decoding; or
while a worker starts. Clients ask greedy, seeded, penalised, stop-string and (vllm) grammar-guided
requests; some leave, some read slowly. Exit status 1 if anything was not as promised.

The result has `figures` (keys in benchmarks/chaos_figures.py); `left_behind`, what stopped servers
left; `master_killed`, how long after a SIGKILL of the master something of its server was still
there, by what it did just then. With vllm also `differences`, a row per answer that is not the
undisturbed one, with the margin in nats by which the undisturbed token had won; and `conditioned`,
how far any token of a greedy answer in the fast form was from the likeliest one after exactly the
tokens that the client had.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos_clients import FakeLoad, Load, Verdict
from benchmarks.chaos_faults import AIMS, Plan
from benchmarks.chaos_figures import figures_of, spread, table
from benchmarks.chaos_master import SCENARIOS, Gone, killed
from benchmarks.chaos_storm import Storm, left_by, storm
from benchmarks.chaos_vllm import PoolLoad, worst_margins
from benchmarks.result import heading, unwind_on_sigterm, write
from tests.e2e.serving import serving
from tests.process.box import Server
from tests.process.load import fake_flags
from tinfer.worker.fake_settings import FakeSettings

# Every phase takes long enough to be struck in.
SLOW = {
    "num_blocks": 256,
    "block_tokens": 8,
    "start_s": 0.2,
    "step_s": 0.003,
    "prefill_token_s": 0.0002,
    "pull_block_s": 0.001,
    "jitter": 0.5,
    "mean_output_tokens": 200,
    "fail_pull_rate": 0.02,
}
FAKE_SETTINGS = FakeSettings(num_blocks=256, block_tokens=8, mean_output_tokens=200)
LONGEST_PROMPT, LONGEST_ANSWER = 300, 700
# So many deaths on so few workers hit one request, or one worker, several times in a row.
STORM = ("--max-worker-restarts", "1000", "--max-request-restarts", "50")
POOL_SIZE = 42
HANG_S = {"fake": 1.0, "vllm": 3.0}


def flags_of(arguments: argparse.Namespace, number: int) -> list[str]:
    """The command line of the `number`th server."""
    route = ("split", "split", "auto")[number % 3]
    shared = [*STORM, "--route", route, "--hang-timeout", str(HANG_S[arguments.engine])]
    if arguments.engine == "fake":
        limits = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "lease_ttl": 0.2}
        return [*fake_flags(SLOW, prefill=2, decode=2, **limits), *shared]
    # Prompts come again and again, so without a cache they are computed again and again.
    caching = [] if number % 2 else ["--no-enable-prefix-caching"]
    shape = ["--prefill", "1", "--decode", "2", "--cpu-threads", "1", "--dtype", arguments.dtype]
    limits_ = ["--max-num-seqs", "6", "--chunk-size", "256", "--lease-ttl", "1"]
    return [*shape, *limits_, *shared, *caching]


@contextlib.contextmanager
def running(flags: Sequence[str], folder: Path) -> Iterator[tuple[Server, Path]]:
    """A ready server with an event log, and the log."""
    log = folder / "events"
    with serving(folder, *flags, "--event-log", str(log), "--log-dir", str(folder)) as process:
        yield Server(process, FAKE_SETTINGS), log


class Chaos:
    """One run: the storms, and what was looked at between them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._pool = PoolLoad(POOL_SIZE, arguments.seed) if arguments.engine == "vllm" else None
        self.storms: list[Storm] = []
        self.left: list[str] = []
        self.margins: list[float] = []
        self.gone: list[Gone] = []

    @property
    def _load(self) -> Load:
        return self._pool or FakeLoad(FAKE_SETTINGS, LONGEST_PROMPT, LONGEST_ANSWER)

    async def run(self) -> None:
        num_left = self._arguments.kills
        number = 0
        while num_left > 0:
            num_here = min(num_left, self._arguments.kills_per_server)
            await self._one(number, num_here)
            num_left -= num_here
            number += 1
        for scenario in SCENARIOS:
            for _ in range(self._arguments.master_kills):
                await self._kill_master(scenario)

    async def _one(self, number: int, num_deaths: int) -> None:
        arguments = self._arguments
        tolerated: tuple[Verdict, ...] = ()
        if arguments.engine == "vllm" and arguments.dtype != "float32":
            tolerated = ("changed",)
        plan = Plan(
            num_deaths,
            arguments.every,
            HANG_S[arguments.engine],
            pins=arguments.engine == "vllm",
            aims=AIMS,
        )
        folder = self._make_folder(f"server{number}")
        seed = arguments.seed * 1000 + number
        with running(flags_of(arguments, number), folder) as (server, log):
            if self._pool is not None and not self._pool.undisturbed:
                await self._pool.ask_all(server.url)
            done = await storm(
                server, self._load, plan, log, arguments.clients, seed, tolerated=tolerated
            )
            self.storms.append(done)
            if self._pool is not None:
                self.margins += await worst_margins(server.url, _fast_answers(done))
            self.left += left_by(server)
        print(f"server {number}: {_line(done)}", flush=True)

    async def _kill_master(self, scenario: Any) -> None:
        folder = self._make_folder("m")
        seed = self._arguments.seed * 1000 + len(self.gone)
        flags = flags_of(self._arguments, 0)
        self.gone.append(await killed(scenario, flags, self._load, folder, seed))
        print(f"master killed: {self.gone[-1]}", flush=True)

    def _make_folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name, dir=self._folder))

    def differences(self) -> list[dict[str, Any]]:
        if self._pool is None:
            return []
        changed = [one for done in self.storms for one in done.asked if one.verdict == "changed"]
        hit = {loss.request_id for done in self.storms for d in done.deaths for loss in d.losses}
        return [
            {**self._pool.difference(one), "form": one.form, "worker_died": one.request_id in hit}
            for one in changed
        ]


def _fast_answers(done: Storm) -> list[Any]:
    """Answers of greedy requests that went on in the fast form with tokens emitted."""
    hit = {
        loss.request_id
        for death in done.deaths
        for loss in death.losses
        if loss.num_emitted and loss.goes_on == "again"
    }
    return [
        one
        for one in done.asked
        if one.request_id in hit and one.form == "fast" and not one.cancelled
    ]


def _line(done: Storm) -> str:
    deaths = sum(fault.kind != "pause" for fault in done.faults)
    return (
        f"{deaths} deaths, {len(done.asked)} requests in {done.seconds:.1f} s, "
        f"{len(done.problems)} problems"
    )


def master_killed(gone: Sequence[Gone]) -> dict[str, Any]:
    """Per scenario how long it took, and what was left."""
    by_scenario: defaultdict[str, list[Gone]] = defaultdict(list)
    for one in gone:
        by_scenario[one.scenario].append(one)
    return {
        scenario: {
            **spread([one.seconds for one in ones]),
            "left": [left for one in ones for left in one.left],
        }
        for scenario, ones in by_scenario.items()
    }


def report_of(arguments: argparse.Namespace, chaos: Chaos) -> dict[str, Any]:
    names = ("engine", "dtype", "kills", "kills_per_server", "every", "clients", "seed")
    report = {
        **heading("chaos"),
        "options": {name: getattr(arguments, name) for name in names},
        "figures": figures_of(chaos.storms),
        "left_behind": chaos.left,
        "master_killed": master_killed(chaos.gone),
    }
    if arguments.engine == "vllm":
        report["differences"] = chaos.differences()
        report["conditioned"] = {
            "answers": len(chaos.margins),
            "worst_margin_nats": round(max(chaos.margins, default=0.0), 5),
        }
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["fake", "vllm"], default="fake")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-server", type=int, default=10)
    parser.add_argument("--every", type=float, default=1.2, help="mean seconds between two faults")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--master-kills", type=int, default=3, help="per scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        chaos = Chaos(arguments, Path(folder))
        asyncio.run(chaos.run())
    report = report_of(arguments, chaos)
    write(report, arguments.json)
    figures = report["figures"]
    print(table(figures["stall"]))
    for name in ("kills", "faults", "requests", "verdicts", "streams_hit", "worker_away"):
        print(f"{name}: {figures[name]}")
    problems = [*figures["problems"], *chaos.left, *(x for one in chaos.gone for x in one.left)]
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
