"""`tinfer serve`: read the options, run the master, turn its end into an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec

from tinfer import config as configuration
from tinfer.cli.ending import EXIT_CANNOT_START
from tinfer.cli.options import options_of
from tinfer.cli.outputs import json_option
from tinfer.errors import StartError


@click.command("serve")
@click.argument("model", required=False)
@options_of(configuration.ServeConfig, skip=frozenset({"model"}))
@click.option("--dry-run", is_flag=True, help="Print the plan and exit; starts nothing.")
@json_option("With --dry-run: write the plan as JSON; - is standard output, and then only JSON.")
def command(dry_run: bool, json_path: str | None, **values: Any) -> None:
    """Serve MODEL on an OpenAI-compatible API, prefill and decode in separate workers.

    MODEL is the directory of a Hugging Face model, or the name (org/name) of one on the hub, which
    is downloaded once; without it, the small built-in model is served. Runs until Ctrl-C: the first
    one lets running requests finish, the second stops at once.
    """
    if json_path is not None and not dry_run:
        raise click.UsageError("--json goes with --dry-run")
    try:
        config = configuration.load(values)
        if dry_run:
            _show_plan(config, json_path)
            return
        from tinfer.master.app import run

        code = run(config)
    except StartError as error:
        if dry_run and json_path is not None:
            _write(msgspec.json.encode({"error": error.message}), json_path)
        click.echo(f"tinfer: {error.message}", err=True)
        sys.exit(EXIT_CANNOT_START)
    sys.exit(code)


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
