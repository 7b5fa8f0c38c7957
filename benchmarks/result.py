"""What every result file begins with, and how it is written."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from tinfer.bench.compare.hardware import hardware_of, versions

_TARGETS = ("--json", "--plot", "--runs")


def unwind_on_sigterm() -> None:
    """Have SIGTERM end this process as an exception does, so that its servers end with it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def heading(name: str) -> dict[str, Any]:
    """The benchmark, the command line that was given, the day, the machine and the versions."""
    return {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *_asked(sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware_of(),
        "versions": versions(),
    }


def _asked(words: Sequence[str]) -> Iterator[str]:
    """Without where the result goes, which is no part of what was measured."""
    before = ""
    for word in words:
        if word not in _TARGETS and before not in _TARGETS:
            yield word
        before = word


def write(report: dict[str, Any], file: TextIO | None) -> None:
    """As indented JSON, where a file was asked for."""
    if file is not None:
        json.dump(report, file, indent=1)
        file.write("\n")
