"""`tinfer plan`: read the options, search, turn the end into an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinfer import config as configuration
from tinfer.cli import sim_options
from tinfer.cli.ending import ended
from tinfer.cli.options import NumberRange, checked
from tinfer.cli.outputs import check_writable, json_option, plot_option
from tinfer.errors import StartError

if TYPE_CHECKING:
    from tinfer.sim.boxes import Box
    from tinfer.sim.plan_app import PlanOptions

# These are what is looked for.
_FOUND = frozenset(("prefill", "decode"))
_EPILOG = """
\b
Swept are the numbers of prefill and decode workers, --sweep, and the GPUs
per worker: one measurement (--tuned, repeatable) or preset each. Every
other option is taken as given.
\b
Exit status: 0 when a configuration reaches the target; 1 if none does; 2
for a bad option; 130 after Ctrl-C, with what was found by then.
\b
The result of --json is one object; tinfer/sim/plan_app.py says what its
keys mean.
"""


@click.command("plan", epilog=_EPILOG)
@click.argument("more_bounds", nargs=-1, metavar="")
@click.option("--gpus", "num_gpus", type=click.IntRange(min=1), required=True, help="GPUs to use.")
@sim_options.source_options
@click.option("--preset", "presets", multiple=True, metavar="NAME", help="As `tinfer simulate`.")
@click.option(
    "--tuned",
    multiple=True,
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="FILE",
    help="Engines as `tinfer tune` measured them, one file per number of GPUs per worker.",
)
@click.option(
    "--slo",
    "bounds",
    multiple=True,
    metavar="LEVEL | NAME:MS ...",
    help="loose (default) or tight: multiples of what each class takes on an idle engine; or the "
    "same bounds for all, as ttft:500 tpot:50 e2el:9000.",
)
@click.option(
    "--target",
    "share",
    type=NumberRange(min=0, min_open=True, max=1),
    default=0.9,
    show_default=True,
    help="Share of all answers that must be within the SLO.",
)
@click.option(
    "--sweep",
    multiple=True,
    metavar="NAME=VALUE,...",
    help="Values of an option of `tinfer serve` to try. Default: route=auto,split and "
    "max-num-batched-tokens=512,2048 (and the measured chunk size), unless these or --chunk-size "
    "are given.",
)
@click.option(
    "--num-draws",
    type=sim_options.POSITIVE,
    default=1,
    show_default=True,
    help="Draws of the workload that each rate is tried with.",
)
@click.option("--jobs", "num_jobs", type=sim_options.POSITIVE, help="Processes. Default: cores.")
@sim_options.policy_options(_FOUND)
@json_option()
@plot_option("Draw the ranking.")
@click.pass_context
def command(context: click.Context, /, **given: Any) -> None:
    """Find how to serve a workload on so many GPUs, by simulation.

    For each configuration the highest rate of requests is sought at which enough answers are within
    their SLO. Printed are the ranking, the `tinfer serve` line of the best one, and its margin over
    the next best and over plain replicas on the same GPUs.
    """

    def planned() -> int:
        check_writable(given["json_path"], given["plot_dir"])
        options = _options(given, _given_names(context))
        from tinfer.master.scheduling import scheduler_config
        from tinfer.sim.plan_app import run

        return run(options, scheduler_config)

    sys.exit(ended(planned))


def _given_names(context: click.Context) -> set[str]:
    """The options that the command line has."""
    source = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) is source}


def _options(given: dict[str, Any], given_names: set[str]) -> PlanOptions:
    """The options as the plan takes them. Raises `StartError`, `click.UsageError`."""
    from tinfer.sim.plan_app import PlanOptions, parse_sweep
    from tinfer.sim.planner import SWEPT, parse_slo

    policies = {name: given.pop(name) for name in sim_options.policy_names(_FOUND)}
    # Both are searched for; a route is checked against them as one candidate has them.
    config = configuration.load({**policies, "seed": given["seed"]})
    bounds, more_bounds = given.pop("bounds"), given.pop("more_bounds")
    # `--slo ttft:500 tpot:50`: what follows the first one has no flag.
    if more_bounds and not bounds:
        raise click.UsageError(f"unexpected argument {more_bounds[0]!r}")
    slo = checked("--slo", parse_slo, (*bounds, *more_bounds) or ("loose",))
    boxes = _boxes(given.pop("presets"), given.pop("tuned"))
    swept = {name: values for name, values in SWEPT.items() if name not in given_names}
    more_swept = parse_sweep(given.pop("sweep"))
    for name in more_swept.keys() - set(policies):
        raise click.UsageError(
            f"--sweep {name.replace('_', '-')}: nothing simulated follows from it"
        )
    if "chunk_size" in given_names or "chunk_size" in more_swept:
        swept.pop("max_num_batched_tokens", None)  # it would go before them
    if "max_num_batched_tokens" in swept:
        # A step holds a token of every sequence, so it cannot be smaller.
        measured = {
            str(max(box.chunk_tokens, config.max_num_seqs))
            for box in boxes
            if box.chunk_tokens is not None
        }
        chunks = {*swept["max_num_batched_tokens"], *measured}
        swept["max_num_batched_tokens"] = tuple(sorted(chunks, key=int))
    source = sim_options.taken_source(given, None)
    del given["seed"]
    return PlanOptions(
        source=source,
        boxes=boxes,
        config=config,
        swept={**swept, **more_swept},
        slo=slo,
        show_progress=sys.stderr.isatty(),
        **given,
    )


def _boxes(presets: tuple[str, ...], tuned: tuple[Path, ...]) -> tuple[Box, ...]:
    """One box per number of GPUs per worker. Raises `StartError`."""
    boxes = [sim_options.measured(path) for path in tuned]
    boxes += [sim_options.box_of(name, None) for name in presets]
    boxes = boxes or [sim_options.box_of(None, None)]
    sizes = [box.num_devices for box in boxes]
    if len(set(sizes)) < len(sizes):
        raise StartError("two measurements or presets have the same number of GPUs per worker")
    return tuple(boxes)
