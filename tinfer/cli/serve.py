"""`tinfer serve`: read the options, run the master, turn its end into an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from tinfer import config as configuration
from tinfer.cli.options import options_of
from tinfer.errors import StartError

EXIT_CANNOT_START = 2


@click.command("serve")
@click.argument("model", required=False)
@options_of(configuration.ServeConfig, skip=frozenset({"model"}))
def command(**values: Any) -> None:
    """Serve MODEL on an OpenAI-compatible API, prefill and decode in separate workers.

    MODEL is the directory of a Hugging Face model; without it, a small built-in test model is
    served. Runs until Ctrl-C: the first one lets running requests finish, the second stops at once.
    """
    try:
        config = configuration.load(values)
        from tinfer.master.app import run

        code = run(config)
    except StartError as error:
        click.echo(f"tinfer: {error.message}", err=True)
        sys.exit(EXIT_CANNOT_START)
    sys.exit(code)
