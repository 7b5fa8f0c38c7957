"""What the online predictor costs: time per prompt hashed, prediction and observation, and memory.

Prompts of 20 to 2000 tokens from 64 tenants with system prompts, after so many answers that every
rung and the ring of neighbours are as full as they get. Then so many observations more of tenants
that never come back, and what the process has grown by.

    python -m benchmarks.predictor_cost --json benchmarks/results/predictor_cost_cpu.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.result import heading, write
from tinfer.predict.asked import Asked, End, Features
from tinfer.predict.features import features_of_tokens
from tinfer.predict.online import OnlinePredictor
from tinfer.predict.online_state import restore, to_bytes

NUM_TENANTS = 64
SYSTEM_TOKENS = 200
VOCAB_SIZE = 32_000
MAX_TOKENS = (256, 1024, 4096)


def prompt(rng: random.Random) -> tuple[int, bytes]:
    """A tenant and its prompt, as int32 token ids."""
    tenant = int(NUM_TENANTS * rng.random() ** 2)
    system = [(tenant * SYSTEM_TOKENS + i) % VOCAB_SIZE for i in range(SYSTEM_TOKENS)]
    own = [int(rng.random() * VOCAB_SIZE) for _ in range(int(20 * 100 ** rng.random()))]
    return tenant, array("i", system + own).tobytes()


def timed(taken_us: list[float], call: Callable[..., Any], *given: object) -> Any:
    start_s = time.perf_counter()
    found = call(*given)
    taken_us.append(1e6 * (time.perf_counter() - start_s))
    return found


def measured(num: int, seed: int) -> tuple[OnlinePredictor, dict[str, list[float]]]:
    """A predictor that has seen `num` answers, and the times of the last half of them."""
    rng = random.Random(seed)
    predictor = OnlinePredictor()
    taken_us: dict[str, list[float]] = {"hash": [], "predict": [], "observe": []}
    for number in range(num):
        tenant, tokens = prompt(rng)
        features = timed(taken_us["hash"], features_of_tokens, tokens, "model")
        most = rng.choice(MAX_TOKENS)
        asked = Asked(f"r{number}", len(tokens) // 4, most, features=features)
        timed(taken_us["predict"], predictor.predict, asked)
        length = max(1, round(rng.lognormvariate(3.0 + tenant / 20, 0.7)))
        end = End.STOP if length <= most else End.LENGTH
        timed(taken_us["observe"], predictor.observe, asked, min(length, most), end)
    return predictor, {name: taken[num // 2 :] for name, taken in taken_us.items()}


def grown(predictor: OnlinePredictor, num: int) -> dict[str, Any]:
    """Memory before and after `num` answers of tenants that come twice and never again."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    start_s = time.perf_counter()
    for number in range(num):
        features = Features(1, 1 + number // 2)
        asked = Asked("r", 1 + number % 4000, 1 + number * 7 % 9000, features=features)
        predictor.observe(asked, 1 + number % 3000, End.STOP)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {
        "num_observations": num,
        "seconds": round(time.perf_counter() - start_s, 1),
        "array_bytes": predictor.num_bytes,
        "grown_bytes": after - before,
        "num_rungs": len(predictor.places),
        "num_heads": len(predictor.heads),
    }


def state(predictor: OnlinePredictor) -> dict[str, Any]:
    """Size of the state, and the time that it takes to make and to read."""
    taken_us: list[float] = []
    data = timed(taken_us, to_bytes, predictor)
    timed(taken_us, restore, OnlinePredictor(), data)
    encode_us, restore_us = taken_us
    return {
        "num_bytes": len(data),
        "encode_ms": round(encode_us / 1e3, 2),
        "restore_ms": round(restore_us / 1e3, 2),
    }


def figures(taken_us: list[float]) -> dict[str, float]:
    """The median bounds what a busy machine adds to it."""
    in_order = sorted(taken_us)
    return {
        "min_us": round(in_order[0], 1),
        "median_us": round(statistics.median(in_order), 1),
        "p99_us": round(in_order[int(0.99 * len(in_order))], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--observations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    predictor, taken_us = measured(arguments.requests, arguments.seed)
    report = {
        **heading("predictor_cost"),
        "num_requests": arguments.requests,
        "times": {name: figures(taken) for name, taken in taken_us.items()},
        "state": state(predictor),
        "memory": grown(predictor, arguments.observations),
    }
    for part in ("times", "state", "memory"):
        for name, value in report[part].items():
            print(f"{part:<7} {name:<17} {value}")
    if arguments.json is not None:
        with arguments.json.open("w") as file:
            write(report, file)


if __name__ == "__main__":
    main()
