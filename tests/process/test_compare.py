"""`tinfer bench compare` end to end: tinfer with its fake engine beside fakes of plain vLLM."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.process.terminal import CTRL_C, on_terminal

ROOT = Path(__file__).resolve().parents[2]
FAKE_VLLM = ROOT / "tests" / "process" / "fake_vllm.py"
COMPARE = ("-m", "tinfer", "bench", "compare")
CORES = sorted(os.sched_getaffinity(0))
STEP = ("step_s=0.002", "prefill_token_s=0.0001")
OURS = shlex.join(["--engine", "fake", *(w for one in STEP for w in ("--fake-engine", one))])
SMALL = (
    *("--device", "cpu", "--cores", f"{CORES[0]},{CORES[-1]}"),
    *("--length-scale", "0.05", "--max-prompt-tokens", "40", "--max-output-tokens", "10"),
    *("--num-unloaded", "1", "--num-warmups", "1", "--num-resamples", "100"),
    *("--tinfer-args", OURS, "--max-model-len", "4096", "--keep-servers"),
)
ONE_POINT = ("--workloads", "LPLD", "--loads", "0.5", "--num-requests", "10")
GIVEN = ("--full-load", "LPLD=100")


def fake(**settings: float | bool) -> tuple[str, ...]:
    """The options that have plain vLLM faked, with its settings."""
    words = ["--step-s", str(settings.pop("step_s", 0.002))]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [f"{value:g}"])]
    command = shlex.join([sys.executable, str(FAKE_VLLM)])
    return "--vllm-command", command, "--vllm-args", shlex.join(words)


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *COMPARE, *SMALL, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def result_of(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_whole_way_with_a_measured_full_load() -> None:
    done = compare(
        *("--arms", "tinfer-auto,tinfer-whole,replicas,replicas-512,paper", *ONE_POINT),
        *(*fake(), "--repetitions", "2", "--probe-s", "0.3", "--json", "-", "--save-detailed"),
        "--restart-servers",
    )
    result = result_of(done)
    assert result["ended_early"] is None
    # Each of the two repetitions has servers of its own.
    assert all(done.stderr.count(f"starting {arm}\n") == 2 for arm in ("tinfer-auto", "paper"))
    (point,) = result["points"]
    arms = ["paper", "replicas", "replicas-512", "tinfer-auto", "tinfer-whole"]
    assert sorted(point["arms"]) == arms
    assert point["baseline"] in ("replicas", "replicas-512") and point["num_repetitions"] == 2
    assert set(point["num_failed"].values()) == {0}
    full = result["full_load"]["LPLD"]
    assert full["arm"] in ("replicas", "replicas-512") and len(full["probes"]) > 1
    assert point["offered_rps"] == pytest.approx(full["rate_rps"] / 2)
    # Interleaved: each repetition has every arm once, directly one after the other.
    order = [(run["repetition"], run["arm"]) for run in result["runs"]]
    assert [sorted(arm for _, arm in order[i : i + 5]) for i in (0, 5)] == [arms, arms]
    assert [repetition for repetition, _ in order] == [0] * 5 + [1] * 5
    # Every arm got the same requests at the same times.
    for repetition in (0, 1):
        asked = [
            [(r["request_id"], r["prompt_tokens"], r["max_output_tokens"]) for r in run["records"]]
            for run in result["runs"]
            if run["repetition"] == repetition
        ]
        assert len(asked) == 5 and all(one == asked[0] for one in asked)
    for arm, metrics in point["arms"].items():
        assert metrics["mean_ttft_ms"]["value"]["value"] > 0
        assert (metrics["mean_ttft_ms"]["ratio"] is None) == (arm == point["baseline"])
        assert metrics["resource_s"]["value"]["value"] > 0
    for arm in result["arms"]:
        is_tinfer = arm["name"].startswith("tinfer")
        assert (arm["scheduler"] is not None) == is_tinfer
        if is_tinfer:
            assert f"tinfer-{arm['scheduler']['route']}" == arm["name"]
            assert arm["scheduler"]["costs"]["source"]
    for run in result["runs"]:
        traces = [record["trace"] is not None for record in run["records"]]
        assert all(traces) if run["arm"].startswith("tinfer") else not any(traces)
    assert result["slos"]["loose"]["LPLD"]["tpot"] == 2 * result["slos"]["tight"]["LPLD"]["tpot"]


def test_plain_vllm_beside_itself_one_arm_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = compare(
        *("--arms", "replicas=a,replicas=b", "--baseline", "a", *ONE_POINT, *GIVEN, *fake()),
        *("--repetitions", "3", "--residency", "alone", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    # Which side of 1 chance is on is not for a test to say; that both arms are judged is.
    assert "Worse than the baseline, with the whole interval:" in done.stdout
    result = json.loads(path.read_text())
    (point,) = result["points"]
    assert point["baseline"] == "a"
    throughput = point["arms"]["b"]["request_throughput"]["ratio"]
    assert 0.5 < throughput["low"] <= throughput["high"] < 2.0
    starts = [line.split()[-1] for line in done.stderr.splitlines() if " starting " in line]
    # Ended and started again: for what is measured first, and in each repetition for each arm.
    assert len(starts) > 2 and set(starts) == {"a", "b"}


def test_a_server_that_does_not_start_is_one_line() -> None:
    done = compare("--arms", "replicas", *ONE_POINT, *GIVEN, *fake(start_fails=True))
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tinfer: a server did not start (exit code 3): ")
    assert "the fake does not start" in last


def test_a_server_that_dies_on_the_way_leaves_what_was_measured() -> None:
    # One warm-up, up to one unloaded request, then about five of each run of ten.
    done = compare(
        *("--arms", "replicas", *ONE_POINT, *GIVEN, *fake(die_after=12)),
        *("--repetitions", "9", "--json", "-"),
    )
    result = result_of(done, code=1)
    assert "replicas: a server ended" in result["ended_early"]
    assert 0 < len(result["runs"]) < 9


def test_a_server_that_dies_while_full_load_is_searched_is_told_as_such() -> None:
    done = compare(
        *("--arms", "replicas", *ONE_POINT, *fake(die_after=4)),
        *("--repetitions", "1", "--probe-s", "0.3"),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("tinfer: replicas: a server ended: ")
    assert " not bounded " not in done.stderr


def test_a_killed_comparison_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path, journal = tmp_path / "result.json", tmp_path / "result.json.journal"
    asked = (
        *("--arms", "replicas=a,replicas=b", "--workloads", "LPLD", "--loads", "0.5"),
        *("--num-requests", "5", "--full-load", "LPLD=40", *fake(), "--json", str(path)),
    )
    with on_terminal(ROOT, *COMPARE, *SMALL, *asked, "--repetitions", "4") as program:
        program.see("[3/8]")
        below = processes_of(program.process.pid)
        program.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(below, timeout=20)
        assert alive == []
    assert not path.exists()
    kept = journal.read_bytes()
    refused = compare(*asked, "--repetitions", "4")
    assert refused.returncode == 2 and "--resume goes on with it" in refused.stderr
    done = compare(*asked, "--repetitions", "4", "--resume")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert len(result["resumed"]) == 1 and result["ended_early"] is None
    counted = [(run["repetition"], run["arm"]) for run in result["runs"]]
    assert sorted(counted) == [(i, arm) for i in range(4) for arm in ("a", "b")]
    assert result["points"][0]["num_repetitions"] == 4
    # Whole repetitions are as they were measured, and nothing is looked for again.
    assert " alone: " not in done.stderr and b'"type":"Alone"' in kept
    first = next(line for line in kept.splitlines() if b'"type":"Ended"' in line)
    assert json.loads(first)["run"]["figures"] == result["runs"][0]["figures"]
    assert not journal.exists()


def processes_of(session: int) -> list[psutil.Process]:
    """Everything below the comparison."""
    return psutil.Process(session).children(recursive=True)


def test_ctrl_c_reports_what_there_is_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with on_terminal(
        ROOT,
        *(*COMPARE, *SMALL, "--arms", "replicas", "--workloads", "LPLD", "--loads", "0.5"),
        *("--num-requests", "5", "--full-load", "LPLD=40", *fake(), "--repetitions", "200"),
        *("--json", str(path)),
    ) as program:
        program.see("[2/200]")
        below = processes_of(program.process.pid)
        assert len(below) >= 6  # two guards, two servers and two engines
        program.type(CTRL_C)
        assert program.wait_end() == 130, program.screen
        assert "not complete: interrupted" in program.screen
    assert [one for one in below if one.is_running()] == []
    result = json.loads(path.read_text())
    assert result["ended_early"] == "interrupted" and len(result["runs"]) >= 2


def test_no_server_outlives_a_killed_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody is left to remove the folder of the servers.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with on_terminal(
        ROOT,
        *(*COMPARE, *SMALL, "--arms", "tinfer-split,replicas", "--workloads", "LPLD"),
        *("--loads", "0.5", "--num-requests", "5", "--full-load", "LPLD=40", *fake()),
        *("--repetitions", "200"),
    ) as program:
        program.see("[1/400]")
        below = processes_of(program.process.pid)
        program.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(below, timeout=20)
        assert alive == []


def test_dry_run_starts_nothing() -> None:
    done = compare("--dry-run", "--full-load", "Mixed=2", *fake())
    assert (done.returncode, done.stderr) == (0, "")
    assert "arm paper (paper)" in done.stdout and "--max-num-batched-tokens 512" in done.stdout
    assert "360 runs of 100 requests:" in done.stdout
    assert "Mixed at 0.5, 0.75, 0.95: arrivals take 109.6 min" in done.stdout
