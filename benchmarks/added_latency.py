"""What the split adds to a request's end-to-end latency at concurrency 1.

Two servers with the built-in model on the same two cores, one that splits every request and one
that computes each whole; a prompt goes to both, in random order, one request at a time. Reported
per prompt length: the median of the paired differences (split minus whole) of E2EL and of TTFT.

    python benchmarks/added_latency.py --json added_latency.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

PROMPT_TOKENS = (30, 300, 1000, 4000)
OUTPUT_TOKENS = 16
START_DEADLINE_S = 180.0


@contextlib.contextmanager
def serving(route: str, folder: Path) -> Iterator[str]:
    """One server; yields its URL."""
    out = folder / f"{route}.out"
    command = [sys.executable, "-m", "tinfer", "serve", "--port", "0", "--route", route]
    with out.open("wb") as sink, (folder / f"{route}.err").open("wb") as err:
        process = subprocess.Popen(
            [*command, "--no-enable-prefix-caching"], stdout=sink, stderr=err
        )
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while not (found := re.search(r" on (http://\S+)", out.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((folder / f"{route}.err").read_text())
            time.sleep(0.1)
        yield found.group(1)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


async def timed(session: aiohttp.ClientSession, url: str, prompt: list[int]) -> tuple[float, float]:
    """(E2EL, TTFT) in seconds of one streamed completion."""
    body = {
        "model": "tinfer-tiny",
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    started, first = time.perf_counter(), 0.0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: ") and not first:
                first = time.perf_counter() - started
    return time.perf_counter() - started, first


async def measure(urls: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    async with aiohttp.ClientSession() as session:
        for tokens in PROMPT_TOKENS:
            rng = random.Random(tokens)
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
            for number in range(rounds + 3):
                prompt = [rng.randrange(256) for _ in range(tokens)]
                for name in rng.sample(list(urls), len(urls)):
                    sample = await timed(session, urls[name], prompt)
                    if number >= 3:  # the first ones map peers and fill caches
                        taken[name].append(sample)
            rows.append(_row(tokens, taken))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(tokens: int, taken: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt_tokens": tokens, "output_tokens": OUTPUT_TOKENS}
    for index, metric in enumerate(("e2el", "ttft")):
        split, whole = ([sample[index] for sample in taken[name]] for name in ("split", "whole"))
        added = [s - w for s, w in zip(split, whole, strict=True)]
        row[f"split_{metric}_ms"] = round(statistics.median(split) * 1e3, 3)
        row[f"whole_{metric}_ms"] = round(statistics.median(whole) * 1e3, 3)
        row[f"added_{metric}_ms"] = round(statistics.median(added) * 1e3, 3)
    return row


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tinfer-bench-")))
        urls = {name: stack.enter_context(serving(name, folder)) for name in ("split", "whole")}
        rows = asyncio.run(measure(urls, arguments.rounds))
    report = {
        "benchmark": "added_latency",
        "command": f"python benchmarks/added_latency.py --rounds {arguments.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "rounds": arguments.rounds,
        "results": rows,
    }
    if arguments.json:
        json.dump(report, arguments.json, indent=2)


if __name__ == "__main__":
    main()
