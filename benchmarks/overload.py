"""Three times as much as the server can take: who is accepted, how fast, and how fast the rest is
sent away.

    python -m benchmarks.overload --engine fake --seed 1 --json overload_fake.json
    python -m benchmarks.overload --engine vllm --seed 1 --json overload_vllm.json \\
        --arm "slo=--slo ttft:{ttft},tpot:{tpot}"

First, on a server without bounds: the unloaded TTFT and TPOT, which set the SLO (5 and 4 times as
much), and the capacity, which is the throughput with everything sent at once. Then each *arm*, a
server with other options, gets Poisson arrivals at every load, in multiples of the capacity. In an
arm's options `{queued}` and `{queued_tokens}` stand for as many requests or prompt tokens as pass
through in the time that the SLO leaves for waiting, `{ttft}` and `{tpot}` for the SLO in ms.

The result has `slo_ms`, `unloaded_ms`, `capacity_rps`, `peak_rps` (the highest throughput of all
measurements) and `points`: per arm and load `offered_rps`; `accepted` and `refused` requests and
`other`, which were neither; `throughput_rps`, answers per second of the time in which the load was
steady; `of_peak`; `slo_share` of the accepted ones; `ttft_ms` and `tpot_ms` of these; `refusal_ms`,
from the sending to the end of the 429; `retry_after_s`, of refusals that were looked at one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from benchmarks.result import heading, unwind_on_sigterm, write
from tests.e2e.serving import serving, until_idle
from tests.process.load import fake_flags
from tinfer.bench.outcome import LoadRun, Outcome, Planned
from tinfer.bench.sender import Sender, frozen_heap, open_session
from tinfer.bench.slo import Slo
from tinfer.workloads import arrivals

# Speeds that leave the box's cores mostly idle: about 12 requests/s by prefill, 25 by decode.
FAKE = {
    "num_blocks": 4096,
    "block_tokens": 16,
    "step_s": 0.01,
    "prefill_token_s": 0.0003,
    "decode_seq_s": 0.0005,
    "pull_block_s": 0.0001,
    "steady": 1,
}
SHAPES = {"fake": (256, 32), "vllm": (1024, 128)}
ARMS = ("reqs=--max-num-queued-reqs {queued}", "tokens=--max-num-queued-tokens {queued_tokens}")
TTFT_FACTOR, TPOT_FACTOR = 5.0, 4.0
# Of the SLO's time, in unloaded TTFTs, what passes on the worker: its own prefill, and up to two
# chunks that are there before it.
ON_WORKER = 3.0
NUM_ALONE = 12
# Of the requests that are sent at once, the middle part: neither filling up nor running empty.
MIDDLE = (0.2, 0.8)
WARM_UP_SHARE = 0.2
LOOK_EVERY_S = 0.25
VOCABULARY = range(1, 256)


class Server:
    """A running server, and how it is asked."""

    def __init__(self, url: str, shape: tuple[int, int], seed: int) -> None:
        self.url = url
        self.prompt_tokens, self.output_tokens = shape
        self._rng = random.Random(f"overload/{seed}")

    def body(self) -> bytes:
        """A request whose prompt no cache knows."""
        return msgspec.json.encode(
            {
                "prompt": self._rng.choices(VOCABULARY, k=self.prompt_tokens),
                "max_tokens": self.output_tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )

    async def run(self, times_s: Sequence[float], max_concurrency: int | None = None) -> LoadRun:
        plan = [
            Planned(
                request_id=str(number),
                planned_s=at_s,
                body=self.body(),
                prompt_tokens=self.prompt_tokens,
                output_tokens=self.output_tokens,
            )
            for number, at_s in enumerate(times_s)
        ]
        async with open_session({}, max_concurrency) as session:
            with frozen_heap():
                sender = Sender(session, f"{self.url}/v1/completions", max_concurrency)
                found = await sender.run(plan)
        await until_idle(self.url, deadline_s=60.0)
        return found

    async def look(self, seconds: float) -> list[float]:
        """Ask now and then besides; what the refused are told in `Retry-After`, in seconds."""
        told = []
        async with aiohttp.ClientSession() as session:
            for _ in range(int(seconds / LOOK_EVERY_S)):
                await asyncio.sleep(LOOK_EVERY_S)
                headers = {"Content-Type": "application/json"}
                url = f"{self.url}/v1/completions"
                async with session.post(url, data=self.body(), headers=headers) as response:
                    if response.status == 429:
                        told.append(float(response.headers["Retry-After"]))
                    await response.read()
        return told


def percentiles(values_s: Sequence[float]) -> dict[str, float | int]:
    """Number, p50, p99 and the largest, in milliseconds."""
    if not values_s:
        return {"num": 0}
    p50, p99 = np.percentile(values_s, (50, 99)) * 1e3
    return {
        "num": len(values_s),
        "p50": round(float(p50), 2),
        "p99": round(float(p99), 2),
        "max": round(max(values_s) * 1e3, 2),
    }


def capacity_rps(run: LoadRun) -> float:
    """Answers per second in the middle of a run in which everything was sent at once. Raises
    `ValueError` if not all were answered."""
    ends = sorted(one.end_s for one in run.outcomes if one.ok)
    if len(ends) < len(run.outcomes):
        raise ValueError(f"{len(run.outcomes) - len(ends)} requests were not answered")
    first, last = (int(share * (len(ends) - 1)) for share in MIDDLE)
    return (last - first) / (ends[last] - ends[first])


def throughput_rps(run: LoadRun, last_arrival_s: float) -> float:
    """Answers per second from the warm-up's end to the last arrival."""
    start_s = WARM_UP_SHARE * last_arrival_s
    num = sum(one.ok and start_s < one.end_s <= last_arrival_s for one in run.outcomes)
    return num / (last_arrival_s - start_s)


async def unloaded(server: Server) -> tuple[float, float]:
    """Median TTFT and TPOT in seconds of requests one at a time."""
    run = await server.run([0.0] * NUM_ALONE, max_concurrency=1)
    warm: list[Outcome] = run.outcomes[2:]
    tpots = [one.tpot_s for one in warm if one.tpot_s is not None]
    return float(np.median([one.ttft_s for one in warm])), float(np.median(tpots))


async def point(
    server: Server, offered_rps: float, seconds: float, slo: Slo, seed: int
) -> tuple[dict[str, Any], float]:
    """One arm at one load, and its throughput."""
    rng = random.Random(f"arrivals/{seed}")
    times_s = list(itertools.takewhile(lambda s: s < seconds, arrivals.poisson(rng, offered_rps)))
    run, told = await asyncio.gather(server.run(times_s), server.look(seconds))
    accepted = [one for one in run.outcomes if one.ok]
    refused = [one for one in run.outcomes if one.status == 429]
    rps = throughput_rps(run, times_s[-1])
    return {
        "offered_rps": round(offered_rps, 2),
        "requests": len(run.outcomes),
        "accepted": len(accepted),
        "refused": len(refused),
        "other": len(run.outcomes) - len(accepted) - len(refused),
        "throughput_rps": round(rps, 3),
        "slo_share": round(sum(slo.met_by(one) for one in accepted) / max(1, len(accepted)), 4),
        "ttft_ms": percentiles([one.ttft_s for one in accepted]),
        "tpot_ms": percentiles([one.tpot_s for one in accepted if one.tpot_s is not None]),
        "refusal_ms": percentiles([one.end_s - one.sent_s for one in refused]),
        "retry_after_s": percentiles([one / 1e3 for one in told]),
        "client_lag_ms": percentiles([one.lag_s for one in run.outcomes]),
    }, rps


class Overload:
    """One benchmark: what is found of the unbounded server, then every arm."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._shape = SHAPES[arguments.engine]
        self.result: dict[str, Any] = {"points": []}

    def _flags(self, words: Sequence[str]) -> list[str]:
        arguments = self._arguments
        if arguments.engine == "fake":
            flags = fake_flags(FAKE, max_num_seqs=16, chunk_size=256)
        else:
            flags = [*([arguments.model] if arguments.model else []), "--max-num-seqs", "16"]
        return [*flags, *arguments.serve.split(), *words]

    async def run(self) -> None:
        arguments = self._arguments
        with serving(self._folder, *self._flags([])) as process:
            server = Server(process.url, self._shape, arguments.seed)
            ttft_s, tpot_s = await unloaded(server)
            capacity = capacity_rps(await server.run([0.0] * arguments.num_at_once))
        slo = Slo(ttft=TTFT_FACTOR * ttft_s * 1e3, tpot=TPOT_FACTOR * tpot_s * 1e3)
        queued = max(1, int((TTFT_FACTOR - ON_WORKER) * ttft_s * capacity))
        values = {
            "ttft": f"{slo.ttft:.0f}",
            "tpot": f"{slo.tpot:.0f}",
            "queued": queued,
            "queued_tokens": queued * self._shape[0],
        }
        self.result |= {
            "slo_ms": slo.bounds(),
            "unloaded_ms": {"ttft": ttft_s * 1e3, "tpot": tpot_s * 1e3},
            "capacity_rps": capacity,
        }
        print(f"capacity {capacity:.2f} requests/s, SLO {slo.bounds()}", flush=True)
        peak = capacity
        for name, words in (arm.split("=", 1) for arm in arguments.arm or ARMS):
            flags = shlex.split(words.format_map(values))
            with serving(self._folder, *self._flags(flags)) as process:
                server = Server(process.url, self._shape, arguments.seed + 1)
                await unloaded(server)
                for load in arguments.loads:
                    found, rps = await point(
                        server, load * capacity, arguments.seconds, slo, arguments.seed
                    )
                    peak = max(peak, rps)
                    row = {"arm": name, "flags": " ".join(flags), "load": load, **found}
                    self.result["points"].append(row)
                    print(_line(row), flush=True)
        self.result["peak_rps"] = peak
        for row in self.result["points"]:
            row["of_peak"] = round(row["throughput_rps"] / peak, 4)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['arm']:<8} x{row['load']:<4g} {row['throughput_rps']:8.2f}/s "
        f"accepted {row['accepted']:5} refused {row['refused']:5} other {row['other']} "
        f"SLO {row['slo_share']:.3f} ttft {row['ttft_ms']} refusal {row['refusal_ms']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.splitlines()[:2]))
    parser.add_argument("--engine", choices=["fake", "vllm"], default="fake")
    parser.add_argument("--model", help="of the server with vllm; default: the built-in one")
    parser.add_argument("--serve", default="", help="more options of every server, as one word")
    parser.add_argument("--arm", action="append", metavar="NAME=OPTIONS", help="servers to load")
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals per point")
    parser.add_argument("--num-at-once", type=int, default=400, help="to find the capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="o") as folder:
        overload = Overload(arguments, Path(folder))
        asyncio.run(overload.run())
    write({**heading("overload"), **overload.result}, arguments.json)
    print(f"peak {overload.result['peak_rps']:.2f} requests/s")


if __name__ == "__main__":
    main()
