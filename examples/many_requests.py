"""Send many streamed chats at a given concurrency or rate, and show the latencies.

    tinfer serve                      # in another terminal
    python examples/many_requests.py --num-requests 200 --concurrency 16

TTFT is from sending a request to its first token, TPOT (E2EL - TTFT) / (output tokens - 1), E2EL
from sending to the last token; waiting for one of the --concurrency places counts in none of them.
The exit code is 1 if a request failed.

--json FILE writes one object; times are in seconds, counts are of completed requests:

    num_requests, num_completed, num_failed, errors (name: how often)
    duration_s, requests_per_s, output_tokens_per_s, prompt_tokens, output_tokens
    ttft_s, tpot_s, e2el_s: each {mean, p50, p90, p99}, or null where nothing was measured
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import tinfer
from tinfer.client import ConnectionFailed, TinferClientError

PROMPTS = (
    "Count from 1 to 10.",
    "Count from 3 to 40.",
    "Repeat after me: the quick brown fox",
    "Spell the word lantern.",
    "What is 12 plus 7?",
    "Tell me a short story about a cat.",
)
PERCENTILES = (50, 90, 99)
TIMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2el_s": "E2EL"}


@dataclass
class Results:
    """What has come of the requests so far."""

    num_completed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    times_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})

    def summary(self, duration_s: float) -> dict[str, Any]:
        """The object that --json writes."""
        num_failed = self.errors.total()
        return {
            "num_requests": self.num_completed + num_failed,
            "num_completed": self.num_completed,
            "num_failed": num_failed,
            "errors": dict(self.errors),
            "duration_s": duration_s,
            "requests_per_s": self.num_completed / duration_s,
            "output_tokens_per_s": self.output_tokens / duration_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            **{name: spread(values) for name, values in self.times_s.items()},
        }


def spread(values: list[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    percentiles = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(np.mean(values)), **named}


async def request(
    client: tinfer.AsyncClient, prompt: str, arguments: argparse.Namespace, results: Results
) -> None:
    """One streamed chat, added to the results however it ends."""
    try:
        async with client.stream_chat(
            prompt,
            max_tokens=arguments.max_tokens,
            temperature=0.0,
            ignore_eos=arguments.ignore_eos or None,
        ) as stream:
            async for _ in stream:
                pass
    except TinferClientError as error:
        results.errors[type(error).__name__] += 1
        return
    results.num_completed += 1
    if stream.usage is not None:
        results.prompt_tokens += stream.usage.prompt_tokens
        results.output_tokens += stream.usage.completion_tokens or 0
    for name in TIMES:
        value = getattr(stream, name)
        if value is not None:
            results.times_s[name].append(value)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send them all; arrivals are a Poisson process where a rate is given."""
    rng = random.Random(arguments.seed)
    prompts = arguments.prompt or PROMPTS
    places = asyncio.Semaphore(arguments.concurrency)
    results = Results()

    async with tinfer.AsyncClient(
        arguments.base_url, max_retries=arguments.max_retries, max_connections=arguments.concurrency
    ) as client:
        await client.models()  # so that a wrong address is one line and not so many failures
        started_s = time.monotonic()
        with tqdm(total=arguments.num_requests, unit="req", disable=arguments.no_progress) as bar:

            async def one(prompt: str) -> None:
                try:
                    await request(client, prompt, arguments, results)
                finally:
                    places.release()
                bar.set_postfix(failed=results.errors.total(), tokens=results.output_tokens)
                bar.update()

            due_s = started_s
            async with asyncio.TaskGroup() as group:
                for number in range(arguments.num_requests):
                    if arguments.request_rate is not None:
                        due_s += rng.expovariate(arguments.request_rate)
                        await asyncio.sleep(due_s - time.monotonic())
                    await places.acquire()
                    group.create_task(one(prompts[number % len(prompts)]))
        return results.summary(time.monotonic() - started_s)


def report(summary: dict[str, Any]) -> str:
    """The summary as a table, times in milliseconds."""
    lines = [
        f"{summary['num_completed']} of {summary['num_requests']} requests completed "
        f"in {summary['duration_s']:.2f} s",
        f"{summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.1f} output tokens/s",
    ]
    if summary["errors"]:
        lines.append("failed: " + ", ".join(f"{n} x {e}" for e, n in summary["errors"].items()))
    names = ["mean", *(f"p{p}" for p in PERCENTILES)]
    lines.append(f"{'ms':<6}" + "".join(f"{name:>10}" for name in names))
    for name, title in TIMES.items():
        values = summary[name]
        shown = [f"{values[n] * 1000:.1f}" if values else "-" for n in names]
        lines.append(f"{title:<6}" + "".join(f"{value:>10}" for value in shown))
    return "\n".join(lines)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def rate(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--num-requests", type=positive, default=50, help="default: %(default)s")
    parser.add_argument("--concurrency", type=positive, default=8, help="default: %(default)s")
    parser.add_argument(
        "--request-rate", type=rate, help="mean arrivals per second; default: as fast as they go"
    )
    parser.add_argument("--max-tokens", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of just --max-tokens")
    parser.add_argument(
        "--prompt", action="append", help="may be given several times; default: a built-in mix"
    )
    parser.add_argument("--max-retries", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    try:
        summary = asyncio.run(run(arguments))
    except ConnectionFailed as error:
        sys.exit(f"many_requests.py: {error}; start a server with `tinfer serve`")
    except (TinferClientError, ValueError) as error:
        sys.exit(f"many_requests.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(report(summary))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(1 if summary["num_failed"] else 0)


if __name__ == "__main__":
    main()
