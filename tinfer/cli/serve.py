"""`tinfer serve`: read the options, run the master, turn its end into an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
import msgspec

from tinfer import config as configuration
from tinfer.cli.ending import EXIT_CANNOT_START
from tinfer.cli.layers import MODEL_VARIABLE, PREFIX, Given, flattened, put_together
from tinfer.cli.options import FieldOption, options_of
from tinfer.cli.outputs import json_option
from tinfer.engine_args import plain_name, why_no_option
from tinfer.errors import StartError

_EPILOG = """
\b
Every option can also come from the environment, as TINFER_<OPTION>
(TINFER_MAX_NUM_SEQS=64, TINFER_MODEL), and from the file of --config
(max_num_seqs = 64). A flag goes before the environment, the environment
before the file. --print-config shows what it comes to.
\b
--engine-arg NAME=VALUE passes an engine argument of vLLM on to all workers,
prefill and decode alike. VALUE is read as JSON where it is JSON, else as
text. What tinfer sets itself is refused at once. Whether vLLM has the
argument and takes the value is checked once vLLM is imported, before any
worker is started; --dry-run does not import it.
"""


class _ServeCommand(click.Command):
    """Says why an option of `vllm serve` is none here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flag = error.option_name
            if reason := why_no_option(flag):
                raise click.UsageError(f"{flag}: {reason}", ctx) from error
            if flag.startswith("--"):
                # An option with a name like it says nothing of whether vLLM has one of that name.
                what = error.format_message().rstrip(".")
                way = f"for one of vLLM's own: --engine-arg {plain_name(flag)}=VALUE"
                raise click.UsageError(f"{what}; {way}", ctx) from error
            raise


@click.command(
    "serve", cls=_ServeCommand, epilog=_EPILOG, context_settings={"auto_envvar_prefix": PREFIX}
)
@click.argument("model", required=False, envvar=MODEL_VARIABLE)
@click.option(
    "--config",
    "config_path",
    envvar=f"{PREFIX}_CONFIG",
    metavar="FILE",
    cls=FieldOption,
    help="Options by their names in a TOML or YAML file; flags and variables go before it.",
)
@options_of(configuration.ServeConfig, skip=frozenset({"model"}))
@click.option(
    "--dry-run",
    is_flag=True,
    allow_from_autoenv=False,
    help="Print the plan and exit; starts nothing.",
)
@click.option(
    "--print-config",
    is_flag=True,
    allow_from_autoenv=False,
    help="Print every option's value and where it comes from, and exit.",
)
@json_option("With --dry-run or --print-config: write it as JSON; - is standard output, alone.")
@click.pass_context
def command(
    context: click.Context,
    /,
    config_path: str | None,
    dry_run: bool,
    print_config: bool,
    json_path: str | None,
    **values: Any,
) -> None:
    """Serve MODEL on an OpenAI-compatible API, prefill and decode in separate workers.

    MODEL is the directory of a Hugging Face model, or the name (org/name) of one on the hub, which
    is downloaded once; without it, the small built-in model is served. Runs until Ctrl-C: the first
    one lets running requests finish, the second stops at once.
    """
    if dry_run and print_config:
        raise click.UsageError("--print-config does not go with --dry-run")
    if json_path is not None and not (dry_run or print_config):
        raise click.UsageError("--json goes with --dry-run or --print-config")
    try:
        given = put_together(context, values, config_path, os.environ)
        config = configuration.load(given.values)
        if print_config:
            _show_config(config, given, json_path)
            return
        if dry_run:
            _show_plan(config, json_path)
            return
        from tinfer.master.app import run

        code = run(config)
    except StartError as error:
        if json_path is not None:
            _write(msgspec.json.encode({"error": error.message}), json_path)
        click.echo(f"tinfer: {error.message}", err=True)
        sys.exit(EXIT_CANNOT_START)
    sys.exit(code)


def _show_config(config: configuration.ServeConfig, given: Given, json_path: str | None) -> None:
    rows = flattened(config, given)
    if json_path != "-":
        width = max(map(len, rows))
        for name, (value, source) in rows.items():
            where = source.kind if source.name is None else f"{source.kind} {source.name}"
            click.echo(f"{name:<{width}}  {_shown(value)}  ({where})")
    if json_path is not None:
        told = {
            name: {"value": value, "source": source.kind, "name": source.name}
            for name, (value, source) in rows.items()
        }
        _write(msgspec.json.format(msgspec.json.encode(told)), json_path)


def _shown(value: Any) -> str:
    """Text as it is, everything else as JSON; nothing is a dash."""
    if value is None or value in ((), {}):
        return "–"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _show_plan(config: configuration.ServeConfig, json_path: str | None) -> None:
    from tinfer.master.plan import text_of
    from tinfer.master.preparation import dry_run

    plan = dry_run(config)
    if json_path != "-":
        click.echo(text_of(plan))
    if json_path is not None:
        _write(msgspec.json.format(msgspec.json.encode(plan)), json_path)


def _write(text: bytes, path: str) -> None:
    try:
        with click.open_file(path, "wb") as file:
            file.write(text + b"\n")
    except OSError as error:
        click.echo(f"tinfer: cannot write {path}: {error.strerror}", err=True)
        sys.exit(EXIT_CANNOT_START)
