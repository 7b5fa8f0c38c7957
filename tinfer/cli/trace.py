"""`tinfer trace`: fetch what a running server did lately, for a viewer of traces."""

from __future__ import annotations

import sys

import click

from tinfer.cli.drain import DEFAULT_URL
from tinfer.cli.ending import ended
from tinfer.cli.key import api_key_option
from tinfer.cli.outputs import check_writable

DEFAULT_OUTPUT = "tinfer-trace.json"
VIEWER = "https://ui.perfetto.dev"
MAX_SECONDS = 3600.0
# A busy server has a hundred thousand events, which it writes beside its streams.
TIMEOUT_S = 120.0
_EPILOG = f"""
\b
Drop the file on {VIEWER}, which keeps it on your machine, or load it
in chrome://tracing. Rows and slices are explained in docs/tracing.md. It has
no prompts and no answers.
\b
Exit status: 0 when it is written, 2 for anything else: no server there, no
such request, a file that cannot be written.
"""


@click.command("trace", epilog=_EPILOG)
@click.argument("request_id", required=False)
@api_key_option()
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The server.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, max=MAX_SECONDS, min_open=True),
    metavar="SECONDS",
    help="How far back to look.  [default: 60; with REQUEST_ID all that the server keeps]",
)
@click.option(
    "--output",
    default=DEFAULT_OUTPUT,
    show_default=True,
    metavar="FILE",
    help="Where to write it, as JSON; - is standard output.",
)
def command(
    request_id: str | None, url: str, api_key: str | None, seconds: float | None, output: str
) -> None:
    """Write what a running server did lately as a Chrome trace: which worker computed which request
    when, step by step, and how full each was.

    With REQUEST_ID only that request: its X-Request-Id, or the id of its answer.
    """
    from tinfer.client import TinferClientError

    sys.exit(
        ended(
            lambda: _run(request_id, url, api_key or None, seconds, output),
            TinferClientError,
            ValueError,
        )
    )


def _run(
    request_id: str | None, url: str, api_key: str | None, seconds: float | None, output: str
) -> int:
    import msgspec

    from tinfer.client import Client

    check_writable(output, None)
    with Client(url, api_key=api_key, max_retries=0, timeout_s=TIMEOUT_S) as client:
        data = client.trace(request_id, seconds)
    with click.open_file(output, "wb", atomic=output != "-") as file:
        file.write(data + b"\n")
    if output != "-":
        num_events = len(msgspec.json.decode(data)["traceEvents"])
        click.echo(f"{output}: {num_events} events; open it in {VIEWER}")
    return 0
