"""The `tinfer` command. Each subcommand imports what it needs only when it runs."""

from __future__ import annotations

import importlib
from typing import Any

import click

_COMMANDS = {
    "serve": "Serve a model on an OpenAI-compatible API.",
    "chat": "Chat in the terminal with a server, or with one started for it.",
    "batch": "Answer a file of requests into a file, in OpenAI's batch format.",
    "bench": "Measure a running server, and draw what was measured.",
    "top": "Watch a running server in the terminal: rates, latencies, workers, what waits.",
    "drain": "Take a worker of a running server out of service; no stream is lost.",
    "restart": "Start a worker of a running server anew; no stream is lost.",
    "trace": "Write what a running server did lately as a trace, to look at in Perfetto.",
    "tune": "Measure this box for a model: what a step and a hand-off cost, and the chunk size.",
    "doctor": "Check this box, and say what to do about what it lacks.",
    "simulate": "Simulate tinfer on a box that need not be there, and what it is compared with.",
    "predictor": "Score predictors of answers' lengths on a request log.",
    "plan": "Find the workers and options that carry the most load within an SLO.",
}


class _LazyGroup(click.Group):
    """Lists its commands without importing them, so that `--help` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"tinfer.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """The package's own word, since a checkout has no installed metadata to ask."""
    if value:
        from tinfer import __version__

        click.echo(f"tinfer, version {__version__}")
        ctx.exit()


@click.command(cls=_LazyGroup)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def main(**_: Any) -> None:
    """One command turns one box into a disaggregated LLM server."""
