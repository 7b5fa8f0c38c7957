"""`tinfer tune` on real processes of the fake engine, whose steps take what they are told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.process.terminal import CTRL_C, on_terminal

STEP_S, PREFILL_TOKEN_S, DECODE_SEQ_S, PULL_BLOCK_S = 0.004, 4e-5, 5e-4, 2e-4
FAKE = {
    "step_s": STEP_S,
    "prefill_token_s": PREFILL_TOKEN_S,
    "decode_seq_s": DECODE_SEQ_S,
    "pull_block_s": PULL_BLOCK_S,
    "max_model_len": 700,
}
SMALL = ("--max-chunk", "256", "--max-num-seqs", "4", "--repeats", "2")


def flags(**more: float) -> list[str]:
    settings = [f"{name}={value}" for name, value in {**FAKE, **more}.items()]
    return ["--engine", "fake", *(word for one in settings for word in ("--fake-engine", one))]


def tune(cache: Path, *arguments: str, **more: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinfer", "tune", *flags(**more), *SMALL, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )


def stored(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_measured_stored_shown_and_drawn(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = tune(cache, "--json", "-")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    steps = [step for step in result["steps"] if step["kind"] == "prefill"]
    assert [step["prefill_tokens"] for step in steps][-2:] == [192, 256]
    for step in steps:  # sleeps take what they are told to, or more on a busy machine
        # A step that began late on a busy machine is shorter by that.
        least_s = STEP_S + PREFILL_TOKEN_S * step["prefill_tokens"]
        assert min(step["samples_s"]) >= 0.5 * least_s
    for point in result["handoffs"]:
        assert min(point["samples_s"]) >= PULL_BLOCK_S * point["tokens"] / 16
    assert [point["tokens"] for point in result["handoffs"]] == [16, 128, 512]
    assert result["fit"]["handoff_measured"] and result["fit"]["costs"]["base_s"] > 0
    assert (result["kv"]["num_blocks"], result["kv"]["block_tokens"]) == (4096, 16)
    assert result["chunk"]["threshold_tokens"] in [step["prefill_tokens"] for step in steps]
    assert result["transport"] == "shm" and result["identity"]["device"] == "fake engine"
    (path,) = stored(cache)
    assert json.loads(path.read_text()) == result
    assert f"stored: {path}" in done.stderr and "it/s" not in done.stderr

    pictures = tmp_path / "pictures"
    again = tune(cache, "--stored", "--plot", str(pictures))
    assert again.returncode == 0, again.stderr
    assert f"chunk     {result['chunk']['chunk_tokens']} tokens" in again.stdout
    assert {p.name for p in pictures.iterdir()} == {"prefill.png", "decode.png", "handoff.png"}
    other = tune(cache, "--stored", "--dtype", "float32")
    assert other.returncode == 2
    assert other.stderr.startswith("tinfer: nothing is stored for tinfer-tiny on fake engine")


def test_a_worker_that_dies_ends_it(tmp_path: Path) -> None:
    done = tune(tmp_path / "cache", die_after_steps=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("tinfer: worker prefill-0 died while it was")
    assert stored(tmp_path) == []


def test_a_worker_that_cannot_start_ends_it(tmp_path: Path) -> None:
    done = tune(tmp_path / "cache", num_blocks=2)
    assert done.returncode == 2 and done.stdout == ""
    assert "cannot start: fake engine: 2 blocks" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("num_presses", [1, 2])
def test_ctrl_c_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_presses: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    arguments = ("-m", "tinfer", "tune", *flags(step_s=0.05), "--plot", str(pictures))
    with on_terminal(Path.cwd(), *arguments) as program:
        program.see("first look")
        program.type(CTRL_C * num_presses)
        assert program.wait_end() == 130
        assert "Traceback" not in program.screen and "tokens/s" not in program.screen
    assert stored(tmp_path) == [] and not pictures.exists()
