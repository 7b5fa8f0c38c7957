"""The import process by itself, at the ends that a master can come to."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinfer.master.zygote_link import Lifeline
from tinfer.wire.control import FrameReader, Imported

DEADLINE_S = 60.0


@pytest.fixture
def lifeline() -> Iterator[Lifeline]:
    made = Lifeline()
    yield made
    made.close()


@pytest.mark.parametrize("has_read", [True, False])
def test_it_cleans_up_whatever_of_the_master_goes_first(
    has_read: bool, lifeline: Lifeline, tmp_path: Path
) -> None:
    """A kill closes the control socket and the lifeline one after the other; with reports that
    nobody has read, the first of them is a reset."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    ours, its = socket.socketpair()
    with ours, its:
        places = ["--control", str(its.fileno()), "--lifeline", str(lifeline.read_fd)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tinfer.worker", *places, "--run-dir", str(run_dir)]
            + ["--engine", "fake"],
            pass_fds=[its.fileno(), lifeline.read_fd],
        )
        its.close()
        try:
            assert select.select([ours], [], [], DEADLINE_S)[0], "it has not said anything"
            if has_read:
                [report] = FrameReader().feed(ours.recv(1 << 16))
                assert isinstance(report, Imported)
            ours.close()
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait()
    assert not run_dir.exists()
