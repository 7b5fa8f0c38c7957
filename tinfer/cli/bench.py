"""`tinfer bench`: read the options, offer load or draw results, turn the end into an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinfer.cli import bench_compare, bench_frontend, bench_handoff, bench_model
from tinfer.cli.ending import ended
from tinfer.cli.options import checked, number_pairs
from tinfer.cli.outputs import check_writable, json_option, plot_option

if TYPE_CHECKING:
    from tinfer.bench.options import BenchOptions

_SERVE_EPILOG = """
\b
Exit status: 0 when the run went to its end, even if some requests failed;
1 if no request was answered; 2 for a bad option or a server that is not
there; 130 after Ctrl-C, with the result of what had come by then.
\b
The result of --json is one object. Keys are those of `vllm bench serve`
where it has them; tinfer/bench/metrics.py says what each one means.
OPENAI_API_KEY is sent as the API key where it is set.
"""


@click.group("bench", no_args_is_help=True)
def command() -> None:
    """Measure a running server, and draw what was measured."""


command.add_command(bench_compare.command)
command.add_command(bench_frontend.command)
command.add_command(bench_handoff.command)
command.add_command(bench_model.command)


@command.command("serve", epilog=_SERVE_EPILOG)
@click.argument("more_goals", nargs=-1, metavar="")
@click.option("--base-url", metavar="URL", help="The server. Default: from --host and --port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the server.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--endpoint", default="/v1/completions", show_default=True, help="Path requests are sent to."
)
@click.option("--model", help="Name to ask for. Default: the first one that the server serves.")
@click.option(
    "--workload",
    default="random",
    show_default=True,
    help="What is asked: random, or a workload of `tinfer.workloads`.",
)
@click.option(
    "--input-len",
    type=click.IntRange(min=1),
    help="Tokens of a prompt of the random workload. Default: 1024.",
)
@click.option(
    "--output-len",
    type=click.IntRange(min=1),
    help="Tokens of an answer of the random workload. Default: 128.",
)
@click.option(
    "--length-scale",
    type=click.FloatRange(min=0, min_open=True),
    help="Factor on all lengths of another workload.",
)
@click.option(
    "--max-prompt-tokens", type=click.IntRange(min=1), help="Cuts another workload's prompts."
)
@click.option(
    "--max-output-tokens", type=click.IntRange(min=1), help="Cuts another workload's answers."
)
@click.option(
    "--workload-option",
    "workload_options",
    multiple=True,
    metavar="NAME=NUMBER",
    callback=number_pairs,
    help="A setting of another workload.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Number of requests.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the whole workload.")
@click.option("--salt", default="", help="Any text: other prompts of the same shape.")
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Requests per second; inf sends all at once. Default: inf, or the workload's own.",
)
@click.option(
    "--burstiness",
    type=click.FloatRange(min=0, min_open=True),
    help="Shape of the gamma gaps between arrivals: 1 is Poisson, less is burstier. Default: 1, "
    "or the workload's own.",
)
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    help="Requests under way at once; more wait in the client.",
)
@click.option(
    "--wait-for-turns",
    is_flag=True,
    help="Send a later turn of a session only once the one before is answered.",
)
@click.option(
    "--num-warmups",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Requests before the run, in no figure.",
)
@click.option(
    "--ready-check-timeout-sec",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Seconds to wait for a server that is not there yet.",
)
@click.option(
    "--goodput",
    "goals",
    multiple=True,
    metavar="NAME:MS ...",
    help="SLO in milliseconds, as ttft:200 tpot:50 e2el:5000.",
)
@click.option("--percentile-metrics", help="Metrics to report, comma-separated.")
@click.option(
    "--metric-percentiles", default="99", show_default=True, help="Percentiles, comma-separated."
)
@click.option("--temperature", type=click.FloatRange(min=0), help="Default: the server's.")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=2),
    help="Tokens to draw prompts from. Default: as the model's configuration says, where the "
    "server names a directory of this machine; else 1000.",
)
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="Sent along.")
@click.option(
    "--trace/--no-trace",
    default=None,
    help="Ask tinfer how each answer was served. Default: where the server is tinfer.",
)
@click.option("--label", help="Name of this server in plots.")
@json_option()
@click.option("--save-detailed", is_flag=True, help="Keep a record of each request in the result.")
@plot_option("Draw latencies and, for tinfer, who computed what.")
def serve(**given: Any) -> None:
    """Offer load to a running server, and report what its clients see.

    Every request is sent when it is due, whatever became of the others. Works with every server of
    the OpenAI API that takes prompts as token ids and `ignore_eos`.
    """
    from tinfer.client.errors import TinferClientError

    def measured() -> int:
        options = _options(given)
        check_writable(options.json_path, options.plot_dir)
        from tinfer.bench.app import run

        return run(options)

    sys.exit(ended(measured, TinferClientError))


@command.command("plot")
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("plots"),
    show_default=True,
    metavar="DIR",
    help="Where the pictures go.",
)
def plot(files: tuple[Path, ...], folder: Path) -> None:
    """Draw results of `tinfer bench serve --json FILE`, several of them together.

    Latency distributions and timelines need --save-detailed, goodput over load needs --goodput and
    a finite --request-rate.
    """

    def drawn() -> int:
        from tinfer.bench.app import plot_files

        return plot_files(files, folder)

    sys.exit(ended(drawn))


def _options(given: dict[str, Any]) -> BenchOptions:
    """The options as the benchmark takes them. Raises `click.UsageError` for a bad one."""
    from tinfer.bench import options as bench
    from tinfer.bench.slo import parse_slo

    host, port, url = given.pop("host"), given.pop("port"), given.pop("base_url")
    goals, more_goals = given.pop("goals"), given.pop("more_goals")
    # `--goodput ttft:200 tpot:50`, as vLLM spells it: what follows the first one has no flag.
    if more_goals and not goals:
        raise click.UsageError(f"unexpected argument {more_goals[0]!r}")
    metrics, percentiles = given.pop("percentile_metrics"), given.pop("metric_percentiles")
    headers = checked("--header", bench.parse_headers, given.pop("headers"))
    if key := os.environ.get("OPENAI_API_KEY"):
        headers = {"Authorization": f"Bearer {key}", **headers}
    is_random = given["workload"] == bench.RANDOM
    for name, flag in (bench.NEVER_RANDOM if is_random else bench.RANDOM_ONLY).items():
        if given[name]:
            raise click.UsageError(f"{flag} does not go with --workload {given['workload']}")
    for name, default in bench.RANDOM_DEFAULTS.items() if is_random else ():
        given[name] = default if given[name] is None else given[name]
    shown_host = f"[{host}]" if ":" in host else host
    return bench.BenchOptions(
        base_url=url or f"http://{shown_host}:{port}",
        ready_timeout_s=given.pop("ready_check_timeout_sec"),
        slo=checked("--goodput", parse_slo, (*goals, *more_goals)),
        metrics=bench.DEFAULT_METRICS
        if metrics is None
        else checked("--percentile-metrics", bench.parse_metrics, metrics),
        percentiles=checked("--metric-percentiles", bench.parse_percentiles, percentiles),
        headers=headers,
        show_progress=sys.stderr.isatty(),
        **given,
    )
