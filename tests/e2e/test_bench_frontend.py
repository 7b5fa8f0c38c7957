"""`tinfer bench frontend` with real engines: ours beside vLLM with one API server and with two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
@pytest.mark.timeout(600)
def test_ours_beside_vllm(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    words = ["--arms", "tinfer,vllm-1,vllm-2", "--streams", "4", "--seconds", "1"]
    words += ["--repetitions", "1", "--num-requests", "20", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "tinfer", "bench", "frontend", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    measured = {(one["arm"], one["point"]["what"]): one for one in result["measured"]}
    assert len(measured) == 6
    for one in measured.values():
        point = one["point"]
        assert one["num_tokens"] == point["num_requests"] * point["output_tokens"]
        # A front end computes no model, and an engine does.
        assert 0 < one["front_s"] < one["engines_s"]
    found = {(one["arm"], one["to"], one["figure"], one["what"]) for one in result["ratios"]}
    for figure in ("front", "whole"):
        assert ("tinfer", "vllm", figure, "tokens") in found
