"""The input file: every line either has its result already, is at fault, or is to be sent."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

from tinfer.batch.lines import BadLine, Request, request_of
from tinfer.batch.results import Results

STANDARD_INPUT = "-"


class Skipped(Struct, frozen=True):
    """A line whose result is in the output from an earlier run."""

    answered: bool


class Survey(Struct):
    """What the lines come to, before any is sent."""

    num_requests: int = 0
    num_skipped: int = 0
    num_skipped_failed: int = 0
    num_to_send: int = 0


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file, which can be read twice: what cannot, is copied first, to one without a name.

    Raises `OSError`.
    """
    if path == STANDARD_INPUT:
        with _copied(sys.stdin.buffer) as copy:
            yield copy
    elif Path(path).is_file():
        with open(path, "rb") as file:
            yield file
    else:
        with open(path, "rb") as pipe, _copied(pipe) as copy:
            yield copy


def sorted_out(file: BinaryIO, results: Results) -> Iterator[Skipped | BadLine | Request]:
    """Each line that is not blank, in order; of a `custom_id` only the first one is a request."""
    seen: set[str] = set()
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        found = request_of(number, line)
        if found.custom_id is not None and found.custom_id in seen:
            message = f"line {number}: custom_id {found.custom_id!r} was there before"
            found = BadLine(number, found.custom_id, "duplicate_custom_id", message)
        elif found.custom_id is not None:
            seen.add(found.custom_id)
        yield _unless_done(found, results)


def survey(file: BinaryIO, results: Results) -> Survey:
    """Count the lines."""
    counts = Survey()
    for found in sorted_out(file, results):
        counts.num_requests += 1
        counts.num_to_send += isinstance(found, Request)
        if isinstance(found, Skipped):
            counts.num_skipped += 1
            counts.num_skipped_failed += not found.answered
    return counts


def _unless_done(found: Request | BadLine, results: Results) -> Skipped | BadLine | Request:
    if found.custom_id is None or _is_duplicate(found):
        return Skipped(False) if results.tells_of(found.line) else found
    answered = results.outcome(found.custom_id)
    return found if answered is None else Skipped(answered)


def _is_duplicate(found: Request | BadLine) -> bool:
    return isinstance(found, BadLine) and found.code == "duplicate_custom_id"


@contextmanager
def _copied(source: BinaryIO) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(source, copy)
        yield copy
