"""The event log: what is replayed is what was decided, and a full disk ends the log alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.unit.core_box import PLAIN
from tests.unit.master_box import D, DispatcherBox, P
from tinfer.core.events import Tick
from tinfer.core.types import SchedulerConfig
from tinfer.errors import StartError
from tinfer.master.event_log import DifferentActions, EventLog, replay


def served(path: Path, num_requests: int) -> DispatcherBox:
    """A dispatcher whose workers have come up and prefilled so many requests, under a log."""
    box = DispatcherBox(roles="")
    box.dispatcher.event_log = log = EventLog(path, SchedulerConfig(**PLAIN))
    for worker in (P, D):
        box.up(worker)
    for number in range(num_requests):
        stream = box.submit(f"r{number}")
        box.prefilled(f"r{number}", number)
        stream.cancel()
    log.close()
    log.close()
    return box


async def test_a_log_is_replayed_to_the_same_actions(tmp_path: Path) -> None:
    served(tmp_path / "log", 9)
    # Two workers are expected and come up; each request arrives, is prefilled in a step and
    # cancelled.
    assert replay(tmp_path / "log") == 2 * 2 + 9 * 4


async def test_who_follows_a_log_sees_each_event_as_it_happens(tmp_path: Path) -> None:
    """So does who looks after the master was killed."""
    path = tmp_path / "log"
    log = EventLog(path, SchedulerConfig(**PLAIN))
    assert len(path.read_bytes().splitlines()) == 1
    log.add(1.0, Tick(), [])
    assert path.read_bytes().splitlines()[1:] == [b'[1.0,{"type":"Tick"},[]]']
    log.close()


async def test_other_actions_than_the_logged_ones_are_told_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    served(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if b"StartDecode" in line)
    lines[start] = lines[start].replace(b'"worker_id":"d"', b'"worker_id":"e"')
    path.write_bytes(b"".join(lines))
    with pytest.raises(DifferentActions, match=f"line {start + 1}: "):
        replay(path)


def test_a_log_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot write --event-log"):
        EventLog(tmp_path, SchedulerConfig())


@pytest.mark.parametrize("num_requests", [1, 100])
async def test_a_full_disk_ends_the_log_and_nothing_else(
    num_requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What the scheduler has decided is carried out; with few requests the end finds it out."""
    box = served(Path("/dev/full"), num_requests)
    assert len(box.told()) >= 2 * num_requests
    (said,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "--event-log" in said.getMessage()
