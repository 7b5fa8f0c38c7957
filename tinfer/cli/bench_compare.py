"""`tinfer bench compare`: read the options, compare, turn the end into an exit code."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinfer.cli.ending import ended
from tinfer.cli.options import checked
from tinfer.cli.outputs import check_writable, json_option, plot_option

if TYPE_CHECKING:
    from tinfer.bench.compare.arms import Arm
    from tinfer.bench.compare.options import CompareOptions

_EPILOG = """
\b
Arms: tinfer-auto, tinfer-split, tinfer-whole: one `tinfer serve` with that
--route. replicas: a plain vLLM server per device with vLLM's own step
budget, and replicas-512 with 512 tokens per step, each behind a balancer
of least outstanding tokens within this process. paper: one vLLM over all
devices, 16 sequences, no chunked prefill. KIND=NAME gives an arm a name of
its own; the same kind twice under two names is a self-check.
\b
Exit status: 0 when all was measured; 1 if a server failed on the way; 2
for a bad option or a server that does not start; 130 after Ctrl-C. What
was measured by then is reported, and no server is left. With --json FILE
all that is measured is in FILE.journal at once, until FILE is complete:
the same command with --resume goes on from it.
\b
The result of --json is one object; tinfer/bench/compare/app.py says what
its keys mean.
"""

_POSITIVE = click.IntRange(min=1)


@click.command("compare", epilog=_EPILOG)
@click.argument("model", required=False)
@click.option("--arms", metavar="KIND[=NAME],...", help="Default: all six.")
@click.option("--baseline", metavar="ARM", help="Default: of each point, its better replica arm.")
@click.option("--workloads", metavar="NAME,...", help="Default: Mixed,LPHD,HPLD,burst.")
@click.option("--loads", metavar="SHARE,...", help="Of the full load. Default: 0.5,0.75,0.95.")
@click.option("--repetitions", type=_POSITIVE, default=5, show_default=True)
@click.option(
    "--num-requests", type=_POSITIVE, default=100, show_default=True, help="Per repetition."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--length-scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor on all lengths.",
)
@click.option("--max-prompt-tokens", type=_POSITIVE, help="Cuts prompts.")
@click.option("--max-output-tokens", type=_POSITIVE, help="Cuts answers.")
@click.option(
    "--full-load",
    multiple=True,
    metavar="WORKLOAD=RATE",
    help="Requests/s that 100 % is, instead of measuring it.",
)
@click.option(
    "--probe-s",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Seconds of arrivals in each look for the full load; at least 60 arrivals.",
)
@click.option(
    "--num-unloaded",
    type=_POSITIVE,
    default=7,
    show_default=True,
    help="Requests per class whose median is the unloaded time.",
)
@click.option(
    "--num-warmups", type=_POSITIVE, default=8, show_default=True, help="Per server and start."
)
@click.option(
    "--num-resamples",
    type=click.IntRange(min=100),
    default=1000,
    show_default=True,
    help="Of the bootstrap.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: GPUs where there are at least as many as workers.",
)
@click.option(
    "--num-workers",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="Devices: workers of tinfer, and plain replicas.",
)
@click.option("--gpus", metavar="GPU,...", help="Indices or UUIDs. Default: the first ones.")
@click.option("--cores", metavar="CORE,...", help="Cores to use, as 0-3,8. Default: the first.")
@click.option(
    "--cpu-threads", type=_POSITIVE, default=1, show_default=True, help="Of each engine on a CPU."
)
@click.option(
    "--residency",
    type=click.Choice(["auto", "together", "alone"]),
    default="auto",
    show_default=True,
    help="All arms up at once, or one at a time. auto: alone on GPUs.",
)
@click.option(
    "--restart-servers/--keep-servers",
    default=True,
    show_default=True,
    help="Whether each repetition starts all servers anew; with --residency alone each arm does.",
)
@click.option(
    "--kv-cache-memory-bytes",
    type=_POSITIVE,
    default=512 << 20,
    show_default=True,
    help="KV cache of each worker and replica.",
)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--block-size", type=_POSITIVE, help="Tokens per KV block. Default: vLLM's choice.")
@click.option(
    "--max-num-seqs",
    type=_POSITIVE,
    default=256,
    show_default=True,
    help="Sequences per step, but in the paper arm.",
)
@click.option("--max-model-len", type=_POSITIVE, help="Default: the model's.")
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True, show_default=True)
@click.option("--enforce-eager", is_flag=True, help="No CUDA graphs (always so on a CPU).")
@click.option("--tinfer-args", default="", metavar="WORDS", help="More of `tinfer serve`.")
@click.option("--vllm-args", default="", metavar="WORDS", help="More of `vllm serve`.")
@click.option(
    "--vllm-command", metavar="WORDS", help="Another vLLM. Default: the one beside tinfer."
)
@click.option(
    "--start-timeout",
    "start_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds that the servers of an arm get to be ready.",
)
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep the servers' output.",
)
@json_option()
@click.option(
    "--resume", is_flag=True, help="Go on where FILE.journal of --json FILE ends, if it is there."
)
@click.option("--save-detailed", is_flag=True, help="Keep a record of each request in the result.")
@plot_option("Draw goodput over load, latencies and ratios.")
@click.option("--dry-run", is_flag=True, help="Print the plan and exit; starts nothing.")
def command(**given: Any) -> None:
    """Compare tinfer with plain vLLM serving MODEL on the same devices, in one run.

    Every arm gets the same requests at the same times, its runs interleaved with the others'. First
    measured are each request class's time on an unloaded replica, which sets the SLOs, and per
    workload the highest rate that the better replica arm sustains, which is full load. Figures are
    ratios to the better replica arm with 95 % intervals, what tinfer loses first. Without MODEL it
    is the small built-in model.
    """
    from tinfer.client.errors import TinferClientError

    def compared() -> int:
        options, arms = _options(given)
        check_writable(options.json_path, options.plot_dir)
        from tinfer.bench.compare.app import run

        return run(options, arms)

    sys.exit(ended(compared, TinferClientError))


def _options(given: dict[str, Any]) -> tuple[CompareOptions, tuple[Arm, ...]]:
    """The options as the comparison takes them. Raises `click.UsageError` for a bad one."""
    from tinfer.bench.compare import options as compare
    from tinfer.bench.compare.arms import default_arms, parse_arms

    named = given.pop("arms")
    arms = default_arms() if named is None else checked("--arms", parse_arms, named)
    parsers: dict[str, Callable[[str], Any]] = {
        "workloads": compare.parse_workloads,
        "loads": compare.parse_loads,
        "cores": compare.parse_cores,
        "gpus": lambda text: tuple(word.strip() for word in text.split(",") if word.strip()),
        "tinfer_args": lambda text: tuple(shlex.split(text)),
        "vllm_args": lambda text: tuple(shlex.split(text)),
        "vllm_command": lambda text: tuple(shlex.split(text)),
    }
    for name, parse in parsers.items():
        flag = f"--{name.replace('_', '-')}"
        if given[name] is None:
            del given[name]
        else:
            given[name] = checked(flag, parse, given[name])
    if given["model"] is None:
        del given["model"]
    given["full_load"] = checked("--full-load", compare.parse_rates, given["full_load"])
    given["threads"] = given.pop("cpu_threads")
    if given["device"] == "auto":
        given["device"] = compare.device_for(given["num_workers"])
    if given["residency"] == "auto":
        given["residency"] = "alone" if given["device"] == "cuda" else "together"
    return compare.CompareOptions(**given), arms
