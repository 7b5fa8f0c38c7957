"""`tinfer doctor`: say what this box lacks to serve well, and clean up after dead servers."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import IO, TYPE_CHECKING

import click
import msgspec

if TYPE_CHECKING:
    from tinfer.doctor.examination import Examination
    from tinfer.doctor.finding import Finding

EXIT_FAULT = 1
_COLOURS = {"ok": "green", "warning": "yellow", "fault": "red"}
_CHECK_WIDTH = 15
_LEVEL_WIDTH = 9
_MIN_TEXT_WIDTH = 40
_EPILOG = """
\b
Exit status: 0 without a fault, 1 with one.
\b
The report of --json is one object: "version"; "findings", a list of
{"check", "level" (ok, warning or fault), "found", "advice"} in the order
of the lines; "num_warnings"; "num_faults"; "elapsed_s".
"""


@click.command("doctor", epilog=_EPILOG)
@click.option(
    "--json",
    "report",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the report here too; - for standard output instead of the lines.",
)
@click.option("--fix", is_flag=True, help="Remove what dead servers left, and nothing else.")
def command(report: str | None, fix: bool) -> None:
    """Check this box: GPUs, memory, limits, engine, hub, port, leftovers of dead servers.

    One line per check: ok, warning or fault, what was found, and what to do about it.
    """
    with _opened(report) as file:
        whole = _examine(fix, is_silent=report == "-")
        if file is not None:
            file.write(msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n")
    sys.exit(EXIT_FAULT if whole.num_faults else 0)


def _opened(report: str | None) -> AbstractContextManager[IO[str] | None]:
    """The file, opened before the checks, since they take a while; replaced when all is written."""
    if report is None:
        return nullcontext()
    try:
        opened: IO[str] = click.open_file(report, "w", atomic=report != "-")
    except OSError as error:
        raise click.BadParameter(f"{report}: {error.strerror}", param_hint="--json") from error
    return opened


def _examine(fix: bool, is_silent: bool) -> Examination:
    from tinfer import __version__
    from tinfer.doctor.examination import Examination, checks_of_this_box, examine

    started_s = time.monotonic()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    findings = []
    for finding in examine(checks_of_this_box(fix)):
        findings.append(finding)
        if not is_silent:
            click.echo("\n".join(lines_of(finding, width)))
    whole = Examination.of(__version__, findings, time.monotonic() - started_s)
    if not is_silent:
        click.echo(_summary(whole.num_faults, whole.num_warnings, whole.elapsed_s))
    return whole


def lines_of(finding: Finding, width: int) -> Iterator[str]:
    """The finding as aligned lines; `width` wraps them, 0 leaves each piece on one line.

    Colour is left out by click where the output is no terminal.
    """
    level = click.style(f"{finding.level:<{_LEVEL_WIDTH}}", fg=_COLOURS[finding.level])
    head = f"{finding.check:<{_CHECK_WIDTH}}{level}"
    margin = " " * (_CHECK_WIDTH + _LEVEL_WIDTH)
    first, *table = finding.found.splitlines()
    for i, line in enumerate(_wrapped(first, width)):
        yield (margin if i else head) + line
    yield from (margin + row for row in table)
    if finding.advice:
        for i, line in enumerate(_wrapped(finding.advice, width - 2)):
            yield margin + ("  " if i else click.style("> ", bold=True)) + line


def _wrapped(text: str, width: int) -> list[str]:
    room = width - _CHECK_WIDTH - _LEVEL_WIDTH
    if room < _MIN_TEXT_WIDTH:
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]


def _summary(num_faults: int, num_warnings: int, elapsed_s: float) -> str:
    def counted(number: int, word: str) -> str:
        return f"{number} {word}{'' if number == 1 else 's'}"

    words = f"{counted(num_faults, 'fault')}, {counted(num_warnings, 'warning')}"
    colour = "red" if num_faults else "yellow" if num_warnings else "green"
    return f"{click.style(words, fg=colour)} in {elapsed_s:.1f} s"
