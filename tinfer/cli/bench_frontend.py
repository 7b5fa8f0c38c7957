"""`tinfer bench frontend`: read the options, measure, turn the end into an exit code."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinfer.cli.ending import ended
from tinfer.cli.options import NumberRange, checked
from tinfer.cli.outputs import check_writable, json_option, plot_option

if TYPE_CHECKING:
    from tinfer.bench.frontend.options import FrontendOptions

_EPILOG = """
\b
Arms: master-whole and master-split: `tinfer serve` with fake engines that
only emit, requests on one worker or split over two. relay: the least that
a master could do, ZeroMQ batches in and server-sent events out. tinfer:
`tinfer serve` with one real engine and the built-in model. vllm-1, vllm-2:
vLLM's own server with that model and so many API server processes. All
answers are streamed completions; ignore_eos makes them as long as asked.
\b
Exit status: 0 when all was measured; 1 if a server failed on the way; 2
for a bad option or a server that does not start; 130 after Ctrl-C. What
was measured by then is reported, and no server is left.
\b
The result of --json is one object; tinfer/bench/frontend/app.py says what
its keys mean.
"""

_POSITIVE = click.IntRange(min=1)


@click.command("frontend", epilog=_EPILOG)
@click.option("--arms", metavar="KIND,...", help="Default: all six.")
@click.option(
    "--streams", default="1,64,256,1024", show_default=True, metavar="N,...", help="At a time."
)
@click.option(
    "--rate",
    type=NumberRange(min=0, min_open=True),
    default=10_000.0,
    show_default=True,
    help="Tokens/s that fake engines emit together where they keep to a pace.",
)
@click.option(
    "--seconds",
    type=NumberRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="About how long each point takes at that rate.",
)
@click.option("--repetitions", type=_POSITIVE, default=3, show_default=True)
@click.option(
    "--num-requests",
    type=_POSITIVE,
    default=1000,
    show_default=True,
    help="Of one token each, for what a request costs.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--vllm-command",
    metavar="COMMAND",
    help="What runs vLLM's command line. Default: the vLLM beside tinfer.",
)
@click.option(
    "--start-timeout",
    "start_timeout_s",
    type=NumberRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds that a server may take to start.",
)
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep what the servers say here.",
)
@json_option()
@plot_option("Draw what a token costs.")
def command(**given: Any) -> None:
    """Measure what the front end costs, in processor time per token and per request.

    tinfer's master beside a bare relay and vLLM's own API server, at several numbers of streams, at
    a pace and at full speed; what it adds to TTFT and ITL on an idle box; and how long its loop
    stalls while prompts of 20,000 tokens arrive. Takes the whole box for a quarter of an hour.
    """

    def measured() -> int:
        options = _options(given)
        check_writable(options.json_path, options.plot_dir)
        from tinfer.bench.frontend.app import run

        return run(options)

    sys.exit(ended(measured))


def _options(given: dict[str, Any]) -> FrontendOptions:
    """The options as the benchmark takes them. Raises `click.UsageError` for a bad one."""
    from tinfer.bench.frontend import options as frontend

    arms, command = given.pop("arms"), given.pop("vllm_command")
    if arms is not None:
        given["arms"] = checked("--arms", frontend.parse_arms, arms)
    if command is not None:
        given["vllm_command"] = tuple(shlex.split(command))
    given["streams"] = checked("--streams", frontend.parse_streams, given["streams"])
    return frontend.FrontendOptions(**given)
