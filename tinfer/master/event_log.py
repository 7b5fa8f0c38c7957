"""The scheduler's events and what it did about them, as JSON lines: to look at, and to replay.

The first line is the scheduler's configuration; every further one is `[now_s, event, actions]`. The
scheduler is pure, so the same events give the same actions again, on any machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from tinfer.core.events import Action, Event
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import SchedulerConfig
from tinfer.errors import StartError

log = logging.getLogger(__name__)

Entry = tuple[float, Event, list[Action]]
_ENTRIES: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)


def check_writable(path: Path) -> None:
    """Makes nothing yet. Raises `StartError` where the log could not be written."""
    place = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise StartError(f"cannot write --event-log {path}")


class EventLog:
    """Appends to one file, which is made anew. Raises `StartError` where it cannot be written; a
    disk that is full later on ends the log, not the server.

    Each line is with the kernel before the next event: whoever follows the file sees what has
    happened, and a master that is killed leaves what it saw last.
    """

    def __init__(self, path: Path, config: SchedulerConfig) -> None:
        try:
            self._file: BinaryIO = path.open("wb")
        except OSError as error:
            raise StartError(f"cannot write --event-log {path}: {error.strerror}") from error
        self._encoder = msgspec.json.Encoder()
        self._write(self._encoder.encode(config))

    def add(self, now_s: float, event: Event, actions: list[Action]) -> None:
        if not self._file.closed:
            self._write(self._encoder.encode((now_s, event, actions)))

    def close(self) -> None:
        """Idempotent."""
        try:
            self._file.close()  # writes what is left, and is closed also where that fails
        except OSError as error:
            log.error("--event-log lacks its end: %s", error.strerror)

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line + b"\n")
            self._file.flush()
        except OSError:
            self.close()


class DifferentActions(Exception):
    """A replay did not do what the log says; the message has the number of the line."""


def replay(path: Path) -> int:
    """Feed a log to a new scheduler; returns the number of events.

    Raises `DifferentActions`, and `msgspec.DecodeError` for what is no such log.
    """
    with path.open("rb") as file:
        config = msgspec.json.decode(file.readline(), type=SchedulerConfig)
        scheduler = Scheduler(config)
        num_events = 0
        for number, (now_s, event, actions) in enumerate(_entries(file), 2):
            found = scheduler.on_event(event, now_s)
            if found != actions:
                raise DifferentActions(f"line {number}: {found} instead of {actions}")
            num_events += 1
    return num_events


def _entries(file: BinaryIO) -> Iterator[Entry]:
    for line in file:
        yield _ENTRIES.decode(line)
