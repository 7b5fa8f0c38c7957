"""The master is killed, whatever is going on: nothing of its server stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.chaos_clients import FakeLoad
from benchmarks.chaos_master import GONE_DEADLINE_S, SCENARIOS, Scenario, killed
from tests.process.load import fake_flags
from tinfer.worker.fake_settings import FakeSettings

FAKE = {"num_blocks": 512, "block_tokens": 8, "start_s": 0.5, "step_s": 0.005}
# A master that dies by itself as soon as it has made something that a name stands for.
DYING = """
import os, signal, sys
import tinfer.master.app as app
kind, name = PLACE
whole = getattr(kind, name)
def part(*arguments, **options):
    whole(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(kind, name, part)
from tinfer.cli import main
main(["serve", "--engine", "fake", "--port", "0"])
"""
PLACES = (
    "os, 'mkdir'",
    "app.Path, 'rename'",
    "app.RunDirectory, 'make'",
    "app.MasterLink, '__init__'",
)


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_nothing_stays(scenario: Scenario, tmp_path: Path) -> None:
    settings = FakeSettings(num_blocks=512, block_tokens=8)
    load = FakeLoad(settings, longest_prompt=100, longest_answer=500)
    flags = fake_flags(FAKE, prefill=2, decode=2, route="split")
    with tempfile.TemporaryDirectory(prefix="k") as short:
        gone = await killed(scenario, flags, load, Path(short), seed=7)
        assert gone.left == [], gone
        assert scenario == "launching" or gone.num_processes >= 2, "it was killed too early"


@pytest.mark.parametrize("place", PLACES)
def test_a_directory_that_was_just_made_goes_too(place: str) -> None:
    """The import process is there before the directory, so there is always who removes it."""
    with tempfile.TemporaryDirectory(prefix="k") as short:
        environment = {**os.environ, "XDG_RUNTIME_DIR": short, "TMPDIR": short}
        script = DYING.replace("PLACE", place)
        done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
        deadline = time.monotonic() + GONE_DEADLINE_S
        while (left := os.listdir(short)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left == []
