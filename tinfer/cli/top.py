"""`tinfer top`: read the options, show the server, turn the end into an exit code."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import click

from tinfer.cli.ending import ended
from tinfer.cli.key import api_key_option
from tinfer.cli.options import NumberRange, checked
from tinfer.cli.outputs import check_writable, json_option

if TYPE_CHECKING:
    from tinfer.top.app import TopOptions

DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_LOST = 1
_EPILOG = """
\b
q and Ctrl-C leave. A server that goes away is waited for. On a terminal that
is narrow, less is shown; NO_COLOR is heeded. Without a terminal it is --once.
\b
Exit status: 0 after q; 130 after Ctrl-C; with --once 0 when all was
answered, 1 where the server cannot be asked now; 2 for a bad option, a key
that the server does not take, or a server that is not tinfer's.
\b
docs/top.md shows a view, and has the keys of --json.
"""


@click.command("top", epilog=_EPILOG)
@click.argument("place", required=False, metavar="[URL]")
@click.option("--url", help=f"The server; the same as URL.  [default: {DEFAULT_URL}]")
@api_key_option()
@click.option(
    "--interval",
    "interval_s",
    type=NumberRange(min=0.1, max=3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks at the server; rates and percentiles are of that time.",
)
@click.option(
    "--waiting",
    "num_waiting",
    type=click.IntRange(min=0, max=200),
    default=5,
    show_default=True,
    metavar="N",
    help="Show at most so many of the requests that wait.",
)
@click.option("--once", is_flag=True, help="Look twice, an interval apart, show that and end.")
@json_option("Write one view here, as --once; - is standard output, and then only JSON.")
def command(
    place: str | None,
    url: str | None,
    api_key: str | None,
    interval_s: float,
    num_waiting: int,
    once: bool,
    json_path: str | None,
) -> None:
    """Show what a running server does: rates, latencies, workers, hand-offs, and what waits."""
    if place is not None and url is not None:
        raise click.UsageError("one server at a time: URL or --url")
    from tinfer.client import TinferClientError
    from tinfer.client.connection import UNIX, server_url
    from tinfer.top.app import TopOptions

    asked = next((one for one in (place, url) if one is not None), DEFAULT_URL)
    if not asked.startswith(UNIX):
        asked = checked("--url" if place is None else "URL", server_url, asked)
    options = TopOptions(
        url=asked, api_key=api_key or None, interval_s=interval_s, num_waiting=num_waiting
    )
    sys.exit(ended(lambda: _run(options, once, json_path), TinferClientError, ValueError))


def _run(options: TopOptions, once: bool, json_path: str | None) -> int:
    """Raises `StartError`, `TinferClientError`."""
    import asyncio

    from rich.console import Console

    from tinfer.top import app
    from tinfer.top.drawing import Picture
    from tinfer.top.view import Sight

    check_writable(json_path, None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal has no letters for is no reason to end.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    is_live = sys.stdout.isatty() and not console.is_dumb_terminal
    if is_live and not once and json_path is None:
        return asyncio.run(app.live(options, console))
    try:
        view = asyncio.run(app.once(options))
    except app.Lost as error:
        click.echo(f"tinfer: {error}", err=True)
        return EXIT_LOST
    if json_path is not None:
        import msgspec

        with click.open_file(json_path, "w", atomic=json_path != "-") as file:
            file.write(msgspec.json.format(msgspec.json.encode(view), indent=2).decode() + "\n")
    if json_path != "-":
        console.print(Picture(Sight(url=view.url, view=view)))
    return 0
