"""Whether `tinfer bench serve` can be trusted: beside `vllm bench serve`, and at high rates.

*Agreement*: one server; both load generators offer it requests of equal lengths at equal gaps, in
turns and in random order. A run's TTFT, TPOT, ITL and E2EL vary with what else the machine does, so
the median over all runs of each is compared, as a ratio of ours to vLLM's.

*Headroom*: a server with the fake engine, whose tokens cost nothing to compute, is offered more and
more; reported is what share of a core the generator takes, and how late it sends.

    python benchmarks/load_generator.py --model heavy --json load_generator.json
"""

from __future__ import annotations

import argparse
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

from tinfer.bench.compare.vllm_command import with_metadata
from tinfer.tiny_model import MODEL_DIR

START_DEADLINE_S = 180.0
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64
# Gamma gaps of this shape are equal for all that a clock can tell.
EQUAL_GAPS = 1e8
FIGURES = (
    *("median_ttft_ms", "mean_ttft_ms", "median_tpot_ms", "mean_tpot_ms", "median_itl_ms"),
    *("mean_itl_ms", "median_e2el_ms", "mean_e2el_ms", "request_throughput", "output_throughput"),
)
TOLERANCE = 0.05
HEADROOM_RPS = (25, 50, 100, 200, 400)
HEADROOM_TOKENS = 32
HEADROOM_S = 8


@contextlib.contextmanager
def serving(folder: Path, *words: str) -> Iterator[str]:
    """One server; yields its URL."""
    out, err = folder / "server.out", folder / "server.err"
    command = [sys.executable, "-m", "tinfer", "serve", "--port", "0", *words]
    with out.open("wb") as sink, err.open("wb") as errors:
        process = subprocess.Popen(command, stdout=sink, stderr=errors)
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while not (found := re.search(r" on (http://\S+)", out.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(err.read_text())
            time.sleep(0.1)
        yield found.group(1)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load_words(arguments: argparse.Namespace) -> list[str]:
    """The flags that both generators spell alike."""
    return [
        *("--num-prompts", str(arguments.num_prompts)),
        *("--request-rate", str(arguments.request_rate), "--burstiness", str(EQUAL_GAPS)),
        *("--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el"),
    ]


def ask_with_tinfer(arguments: argparse.Namespace, url: str, number: int) -> dict[str, Any]:
    """The result of one run of `tinfer bench serve`."""
    words = [word for word in load_words(arguments) if word != "--ignore-eos"]
    words += ["--input-len", str(PROMPT_TOKENS), "--output-len", str(OUTPUT_TOKENS)]
    return bench(url, *words, "--salt", str(number))


def bench(url: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tinfer", "bench", "serve", "--base-url", url, "--json", "-"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ask_with_vllm(
    arguments: argparse.Namespace, url: str, number: int, folder: Path
) -> dict[str, Any]:
    """The result of one run of `vllm bench serve`, whose prompts are text of that many bytes."""
    prompts, result = folder / "prompts.json", folder / "vllm.json"
    rng = random.Random(number)
    letters = "abcdefghijklmnopqrstuvwxyz "
    asked = ["".join(rng.choices(letters, k=PROMPT_TOKENS)) for _ in range(arguments.num_prompts)]
    # The one shape of a file that it reads without further packages.
    turns = [[{"value": text}, {"value": "of no use"}] for text in asked]
    prompts.write_text(json.dumps([{"conversations": both} for both in turns]))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
            *("--tokenizer", str(MODEL_DIR), "--dataset-name", "sharegpt"),
            *("--dataset-path", str(prompts), "--sharegpt-output-len", str(OUTPUT_TOKENS)),
            *("--disable-shuffle", "--disable-tqdm"),
            *(*load_words(arguments), "--save-result", "--result-dir", str(folder)),
            *("--result-filename", result.name),
        ],
        env=with_metadata(dict(os.environ), folder / "metadata"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def agreement(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians over all runs of both generators, and their ratios."""
    runs: dict[str, list[dict[str, Any]]] = {"tinfer": [], "vllm": []}
    with serving(folder, arguments.model) as url:
        rng = random.Random(0)
        bench(url, "--num-prompts", "8", "--input-len", str(PROMPT_TOKENS), "--salt", "warm")
        for number in range(arguments.rounds):
            for name in rng.sample(list(runs), len(runs)):
                if name == "tinfer":
                    result = ask_with_tinfer(arguments, url, number)
                else:
                    result = ask_with_vllm(arguments, url, number, folder)
                assert result["completed"] == arguments.num_prompts, result
                runs[name].append(result)
                shown = {key: round(result[key], 2) for key in FIGURES[:5]}
                print(name, result["total_input_tokens"], shown, flush=True)
    rows = []
    for key in FIGURES:
        ours, theirs = ([run[key] for run in runs[name]] for name in runs)
        row = {"figure": key, "tinfer": statistics.median(ours), "vllm": statistics.median(theirs)}
        row["ratio"] = row["tinfer"] / row["vllm"]
        row["tinfer_runs"], row["vllm_runs"] = ours, theirs
        rows.append(row)
        print(f"{key:<20} {row['tinfer']:10.3f} {row['vllm']:10.3f}  x{row['ratio']:.4f}")
    return {
        "figures": rows,
        "within_tolerance": all(abs(row["ratio"] - 1) <= TOLERANCE for row in rows),
        "total_input_tokens": {
            name: sorted({run["total_input_tokens"] for run in of}) for name, of in runs.items()
        },
    }


def headroom(folder: Path) -> list[dict[str, Any]]:
    """The generator's own figures at each rate."""
    rows = []
    with serving(folder, "--engine", "fake") as url:
        for rate_rps in HEADROOM_RPS:
            result = bench(
                url,
                *("--num-prompts", str(rate_rps * HEADROOM_S), "--request-rate", str(rate_rps)),
                *("--input-len", "64", "--output-len", str(HEADROOM_TOKENS)),
                *("--salt", str(rate_rps)),
            )
            keys = ("completed", "failed", "request_throughput", "output_throughput")
            keys += ("client_cpu_share", "client_lag_p50_ms", "client_lag_p99_ms")
            row = {"offered_rps": rate_rps, **{key: result[key] for key in keys}}
            rows.append({**row, "client_lag_max_ms": result["client_lag_max_ms"]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model of `tinfer bench model`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--request-rate", type=float, default=1.5)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tinfer-bench-") as folder:
        report = {
            "benchmark": "load_generator",
            "command": f"python benchmarks/load_generator.py --model {Path(arguments.model).name} "
            f"--rounds {arguments.rounds} --num-prompts {arguments.num_prompts} "
            f"--request-rate {arguments.request_rate:g}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "headroom": headroom(Path(folder)),
            "agreement": agreement(arguments, Path(folder)),
        }
    if arguments.json:
        json.dump(report, arguments.json, indent=2)


if __name__ == "__main__":
    main()
