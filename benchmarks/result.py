"""What every result file begins with, and how it is written."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tinfer.bench.compare.hardware import hardware_of, versions


def unwind_on_sigterm() -> None:
    """Have SIGTERM end this process as an exception does, so that its servers end with it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def heading(name: str) -> dict[str, Any]:
    """The benchmark, the command line that was given, the day, the machine and the versions."""
    words = [word for word in sys.argv[1:] if not _is_file(word)]
    return {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *words]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware_of(),
        "versions": versions(),
    }


def _is_file(word: str) -> bool:
    """Where a result goes is no part of what was measured."""
    return word == "--json" or Path(word).suffix in (".json", ".png")


def write(report: dict[str, Any], file: TextIO | None) -> None:
    """As indented JSON, where a file was asked for."""
    if file is not None:
        json.dump(report, file, indent=1)
        file.write("\n")
