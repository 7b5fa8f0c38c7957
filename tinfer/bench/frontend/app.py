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
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from tinfer.bench.compare.hardware import hardware_of, versions
from tinfer.bench.frontend.arms import modes_of, server_of
from tinfer.bench.frontend.options import FrontendOptions
from tinfer.bench.frontend.points import Measured
from tinfer.bench.frontend.report import lines_of
from tinfer.bench.frontend.session import Session, Stopped
from tinfer.bench.frontend.summary import ratios_of, rows_of
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
    _write(options, result_of(options, measured, ended_early, date), measured)
    if ended_early is None:
        return EXIT_OK
    return EXIT_INTERRUPTED if ended_early == "interrupted" else EXIT_ENDED_EARLY


async def _measure(options: FrontendOptions, scratch: Path) -> tuple[list[Measured], str | None]:
    """What was measured, and why no more than that; nothing runs any more then."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    session = Session(options, scratch, stop, _say)
    try:
        await session.all()
    except Stopped:
        return session.measured, "interrupted"
    except (StartError, OSError) as error:
        if not session.measured:
            raise
        return session.measured, str(error)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return session.measured, None


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def result_of(
    options: FrontendOptions, measured: list[Measured], ended_early: str | None, date: str
) -> dict[str, Any]:
    """The object that `--json` writes; see the module."""
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
            {
                "arm": kind,
                "mode": mode,
                "command": shlex.join(server_of(kind, mode, options).argv),
                "environment": dict(server_of(kind, mode, options).environment),
            }
            for kind in options.arms
            for mode in modes_of(kind)
        ],
        "rows": msgspec.to_builtins(rows_of(measured)),
        "ratios": msgspec.to_builtins(ratios_of(measured)),
        "measured": msgspec.to_builtins(measured),
    }


def _write(options: FrontendOptions, result: dict[str, Any], measured: list[Measured]) -> None:
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if options.json_path == "-":
        sys.stdout.write(text + "\n")
    else:
        lines = lines_of(rows_of(measured), ratios_of(measured))
        sys.stdout.writelines(f"{line}\n" for line in lines)
        if options.json_path is not None:
            Path(options.json_path).write_text(text + "\n")
    if result["ended_early"] is not None:
        sys.stderr.write(f"tinfer: warning: not complete: {result['ended_early']}\n")
    if options.plot_dir is not None:
        from tinfer.bench.frontend.charts import draw_all

        for path in draw_all(rows_of(measured), options.plot_dir):
            sys.stderr.write(f"drawn: {path}\n")
