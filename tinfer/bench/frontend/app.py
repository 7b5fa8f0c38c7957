"""`tinfer bench frontend` from options to exit code: measure, sum up, report.

The result (`--json`) is one object:

| key | holds |
|---|---|
| `kind` | "tinfer bench frontend" |
| `date`, `command`, `versions`, `hardware`, `settings`, `seed` | what it takes to run it again |
| `ended_early` | null, "interrupted", or why the measuring ended before its end |
| `servers` | by arm and mode: command line (port aside) and environment |
| `rows` | medians by arm and point, see `Row` in tinfer/bench/frontend/summary.py |
| `ratios` | see `Ratio` there |
| `measured` | every run, see `Measured` in tinfer/bench/frontend/points.py |
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from tinfer.bench.compare.hardware import hardware_of, versions
from tinfer.bench.frontend.arms import Mode, modes_of, server_of
from tinfer.bench.frontend.options import FrontendOptions, Kind
from tinfer.bench.frontend.points import Measured
from tinfer.bench.frontend.report import lines_of
from tinfer.bench.frontend.session import Session
from tinfer.bench.frontend.summary import Ratio, Row, ratios_of, rows_of
from tinfer.bench.interruption import Interrupted, stop_on_signals
from tinfer.bench.report import say
from tinfer.errors import StartError

EXIT_OK = 0
EXIT_ENDED_EARLY = 1
EXIT_INTERRUPTED = 130


def run(options: FrontendOptions) -> int:
    """Measure and report; returns the exit code.

    0: everything was measured; 1: a server failed on the way, and what was measured by then is
    reported; 130: interrupted, likewise. Raises `StartError` and `OSError` where nothing was.
    """
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with tempfile.TemporaryDirectory(prefix="tinfer-frontend-") as scratch:
        (options.log_dir or Path(scratch)).mkdir(parents=True, exist_ok=True)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            measured, ended_early = runner.run(_measure(options, Path(scratch)))
    rows, ratios = rows_of(measured), ratios_of(measured)
    result = {
        **result_of(options, ended_early, date),
        "rows": msgspec.to_builtins(rows),
        "ratios": msgspec.to_builtins(ratios),
        "measured": msgspec.to_builtins(measured),
    }
    _write(options, result, rows, ratios)
    if ended_early is None:
        return EXIT_OK
    return EXIT_INTERRUPTED if ended_early == "interrupted" else EXIT_ENDED_EARLY


async def _measure(options: FrontendOptions, scratch: Path) -> tuple[list[Measured], str | None]:
    """What was measured, and why no more than that; nothing runs any more then."""
    with stop_on_signals() as stop:
        session = Session(options, scratch, stop, say)
        try:
            await session.all()
        except Interrupted:
            return session.measured, "interrupted"
        except (StartError, OSError) as error:
            if not session.measured:
                raise
            return session.measured, str(error)
    return session.measured, None


def result_of(options: FrontendOptions, ended_early: str | None, date: str) -> dict[str, Any]:
    """What the object that `--json` writes has beside the figures; see the module."""
    return {
        "kind": "tinfer bench frontend",
        "date": date,
        "command": shlex.join(["tinfer", *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware_of(),
        "settings": msgspec.to_builtins(options, enc_hook=str),
        "seed": options.seed,
        "ended_early": ended_early,
        "servers": [
            _server(kind, mode, options) for kind in options.arms for mode in modes_of(kind)
        ],
    }


def _server(kind: Kind, mode: Mode, options: FrontendOptions) -> dict[str, Any]:
    server = server_of(kind, mode, options)
    command, environment = shlex.join(server.argv), dict(server.environment)
    return {"arm": kind, "mode": mode, "command": command, "environment": environment}


def _write(
    options: FrontendOptions, result: dict[str, Any], rows: list[Row], ratios: list[Ratio]
) -> None:
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if options.json_path == "-":
        sys.stdout.write(text + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines_of(rows, ratios))
        if options.json_path is not None:
            Path(options.json_path).write_text(text + "\n")
    if result["ended_early"] is not None:
        sys.stderr.write(f"tinfer: warning: not complete: {result['ended_early']}\n")
    if options.plot_dir is not None:
        from tinfer.bench.frontend.charts import draw_all

        for path in draw_all(rows, options.plot_dir):
            sys.stderr.write(f"drawn: {path}\n")
