"""`tinfer drain` and `tinfer restart`: read the options, follow the worker, tell how it ended."""

from __future__ import annotations

import sys
from typing import Literal

import click

from tinfer.cli.ending import ended
from tinfer.cli.key import api_key_option
from tinfer.cli.outputs import check_writable, json_option

Action = Literal["drain", "restart"]
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 30.0
_EPILOG = """
\b
Exit status: 0 when it is done, 1 when the worker could not be started again,
2 when nothing could be done.
\b
The report of --json is one object: "action", "worker", "state" (stopped,
ready or given-up) and "reason", "generation" at the end, "num_requests" on
the worker at the start, "num_moved" of all requests that went on elsewhere
meanwhile, "elapsed_s".
"""


def made(action: Action, words: str) -> click.Command:
    """The command of that name; `words` is its help."""

    @click.command(action, help=words, epilog=_EPILOG)
    @click.argument("worker")
    @api_key_option()
    @click.option("--url", default=DEFAULT_URL, show_default=True, help="The server.")
    @click.option(
        "--timeout",
        "drain_timeout_s",
        type=click.FloatRange(min=0, max=86400),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        metavar="SECONDS",
        help="What the worker still has by then goes on elsewhere.",
    )
    @json_option()
    def command(
        worker: str,
        url: str,
        api_key: str | None,
        drain_timeout_s: float,
        json_path: str | None,
    ) -> None:
        from tinfer.client import TinferClientError

        sys.exit(
            ended(
                lambda: _run(action, worker, url, api_key or None, drain_timeout_s, json_path),
                TinferClientError,
                ValueError,
            )
        )

    return command


def _run(
    action: Action,
    worker: str,
    url: str,
    api_key: str | None,
    drain_timeout_s: float,
    json_path: str | None,
) -> int:
    import msgspec

    from tinfer.admin.rolling import EXIT_GIVEN_UP, roll
    from tinfer.client import Client

    check_writable(json_path, None)
    with Client(url, api_key=api_key, max_retries=0, timeout_s=10.0) as client:
        done = roll(
            client, action, worker, drain_timeout_s, lambda line: click.echo(line, err=True)
        )
    if json_path is not None:
        with click.open_file(json_path, "w", atomic=json_path != "-") as file:
            file.write(msgspec.json.format(msgspec.json.encode(done), indent=2).decode() + "\n")
    if json_path != "-":
        moved = f"; {done.num_moved} of its requests went on elsewhere" if done.num_moved else ""
        why = f" ({done.reason})" if done.reason else ""
        click.echo(f"{worker} is {done.state}{why} after {done.elapsed_s:.1f} s{moved}")
    return EXIT_GIVEN_UP if done.state == "given-up" else 0


command = made(
    "drain",
    "Take WORKER of a running server out of service: it takes nothing new, finishes what it has, "
    "and stops, which frees its device. `tinfer restart` brings it back.",
)
