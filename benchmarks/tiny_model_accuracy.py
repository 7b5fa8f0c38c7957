"""How often the built-in model is right on held-out prompts, split and in one plain engine.

    python -m benchmarks.tiny_model_accuracy --num 400 --json tiny_model_accuracy.json

Keys: `results` has per task the share of exactly right answers through the split and through one
plain vLLM engine; `num_differing_answers` counts prompts whose two answers differ at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from benchmarks.added_latency import hardware
from tests.e2e.accuracy import accuracy, questions, through_plain_engine, through_server
from tests.e2e.serving import serving
from tinfer.tiny_model import MODEL_DIR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=400, help="held-out prompts per task")
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    examples = questions(arguments.num)
    plain = through_plain_engine(str(MODEL_DIR), examples)
    with tempfile.TemporaryDirectory(prefix="tinfer-bench-") as name:
        options = ("--served-model-name", "tiny", "--route", "split")
        with serving(Path(name), *options) as server:
            split = asyncio.run(through_server(server.url, "tiny", examples))
    shares = {"split": accuracy(examples, split), "plain": accuracy(examples, plain)}
    report = {
        "benchmark": "tiny_model_accuracy",
        "command": f"python -m benchmarks.tiny_model_accuracy --num {arguments.num}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "num_per_task": arguments.num,
        "num_differing_answers": sum(p != s for p, s in zip(plain, split, strict=True)),
        "results": {
            task: {side: round(share[task], 4) for side, share in shares.items()}
            for task in shares["split"]
        },
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        json.dump(report, arguments.json, indent=2)


if __name__ == "__main__":
    main()
