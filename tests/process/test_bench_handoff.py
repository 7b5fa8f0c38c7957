"""`tinfer bench handoff` end to end on a small buffer, on its own and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tinfer.worker.kv_bench.copies import Row
from tinfer.worker.kv_bench.options import NUM_LAYERS

SMALL = {"device": "cpu", "pages": [64], "sizes": [8192], "rounds": 1, "buffer_bytes": 64 << 20}


def test_the_whole_way(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    words = ["--device", "cpu", "--pages", "64", "--sizes", "8192", "--rounds", "1"]
    words += ["--buffer-bytes", str(64 << 20), "--json", str(path), "--plot", str(tmp_path)]
    done = _run("tinfer", "bench", "handoff", *words)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert [row["layout"] for row in written["rows"]] == ["layers-first", "blocks-first"]
    assert set(written["rows"][0]) == set(Row.__struct_fields__)
    assert written["ended_early"] is None and written["num_layers"] == NUM_LAYERS
    assert (tmp_path / "handoff.png").stat().st_size > 5000
    assert len(done.stdout.splitlines()) == 4


def test_without_the_command_line(tmp_path: Path) -> None:
    """As bin/gpu-check has it."""
    path = tmp_path / "result.json"
    options = {**SMALL, "layouts": ["blocks-first"], "json_path": str(path)}
    done = _run("tinfer.worker.kv_bench", json.dumps(options))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(path.read_text())["rows"]) == 1


@pytest.mark.parametrize("given", ['{"pages": 8}', "{", '{"page": [8]}', '{"device": "tpu"}'])
def test_bad_options_without_the_command_line_are_one_line(given: str) -> None:
    done = _run("tinfer.worker.kv_bench", given)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("kv_bench: ") and len(done.stderr.splitlines()) == 1


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False
    )
