"""`tinfer simulate`: read the options, simulate, turn the end into an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinfer import config as configuration
from tinfer.cli import sim_options
from tinfer.cli.ending import ended
from tinfer.cli.options import NumberRange
from tinfer.cli.outputs import check_writable, json_option, plot_option

if TYPE_CHECKING:
    from tinfer.sim.app import SimulateOptions

_EPILOG = """
\b
Baselines, on the same devices with the same requests: replicas: plain
engines behind a balancer of least outstanding tokens; replicas-N: with N
tokens per step; hybrid: prompts under --split-from tokens whole on decode
workers, the others split; paper: its vLLM, 16 sequences and no chunked
prefill, on one engine (of the preset `paper`: on one pair of GPUs, as it
was measured; elsewhere on all devices at ideal scaling).
\b
Exit status: 0 when all was simulated; 1 where a request is never answered;
2 for a bad option; 130 after Ctrl-C.
\b
The result of --json is one object; tinfer/sim/report.py says what its keys
mean. Equal options give equal bytes, but for the date.
"""


@click.command("simulate", epilog=_EPILOG)
@sim_options.source_options
@click.option(
    "--request-rate",
    type=NumberRange(min=0, min_open=True),
    help="Requests per second; inf has all come at once. Default: the workload's (log's) own.",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Engines by name: cpu-52m (default), gpu-estimate, paper (OPT-13B on pairs of V100).",
)
@click.option(
    "--tuned",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="FILE",
    help="Engines as `tinfer tune` measured them.",
)
@sim_options.policy_options()
@click.option("--baseline", default="", metavar="NAME,...", help="Arms beside tinfer, see below.")
@click.option(
    "--split-from",
    "split_from_tokens",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Prompt length from which the hybrid splits.",
)
@click.option(
    "--predictor-tax",
    type=NumberRange(min=1, max=100),
    default=1.0,
    show_default=True,
    help="Times as long that steps of prefill workers take beside a length predictor (paper: 1.1).",
)
@click.option(
    "--noise",
    type=NumberRange(min=0, max=2),
    default=0.0,
    show_default=True,
    help="Standard deviation of the logarithm of step times.",
)
@json_option()
@click.option("--save-detailed", is_flag=True, help="Keep each request in the result.")
@plot_option("Draw latencies, and who computed what.")
def command(**given: Any) -> None:
    """Simulate tinfer on a box that need not be there, deciding by the scheduler of the server.

    Time is virtual, engines are cost models; the same options always give the same result.
    """

    def simulated() -> int:
        check_writable(given["json_path"], given["plot_dir"])
        options = _options(given)
        from tinfer.master.scheduling import scheduler_config
        from tinfer.sim.app import run

        return run(options, scheduler_config)

    sys.exit(ended(simulated))


def _options(given: dict[str, Any]) -> SimulateOptions:
    """The options as the simulation takes them. Raises `StartError`, `click.UsageError`."""
    from tinfer.sim.app import SimulateOptions

    policies = {name: given.pop(name) for name in sim_options.policy_names()}
    config = configuration.load({**policies, "seed": given["seed"]})
    source = sim_options.taken_source(given, given.pop("request_rate"))
    del given["seed"]
    baselines = sim_options.parse_names(given.pop("baseline"))
    return SimulateOptions(
        source=source,
        box=sim_options.box_of(given.pop("preset"), given.pop("tuned")),
        config=config,
        baselines=baselines,
        show_progress=sys.stderr.isatty(),
        **given,
    )
