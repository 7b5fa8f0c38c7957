"""`tinfer bench serve` end to end against a server of the fake engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import until_idle
from tests.process.box import Server, running
from tests.process.terminal import CTRL_C, on_terminal

ROOT = Path(__file__).resolve().parents[2]
BENCH = ("-m", "tinfer", "bench", "serve")
# Slow enough that a run is still under way when it is looked at.
FAKE = {"step_s": 0.002, "mean_output_tokens": 1_000_000}
SMALL = ("--input-len", "20", "--output-len", "5")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), FAKE, route="split") as made:
        yield made
        made.stop()


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *BENCH, *arguments], capture_output=True, text=True, check=False
    )


def result_of(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_json_alone_on_standard_output(server: Server) -> None:
    done = bench(
        *("--base-url", server.url, *SMALL, "--num-prompts", "12", "--request-rate", "100"),
        *("--num-warmups", "3", "--max-concurrency", "4", "--goodput", "ttft:60000", "tpot:60000"),
        *("--json", "-", "--save-detailed"),
    )
    result = result_of(done)
    assert (result["completed"], result["failed"], result["interrupted"]) == (12, 0, False)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (240, 60)
    assert result["num_short_answers"] == result["num_without_usage"] == 0
    assert result["status_counts"] == {"200": 12} and result["error_counts"] == {}
    assert result["request_throughput"] == pytest.approx(12 / result["duration"])
    assert result["request_goodput"] == result["request_throughput"]
    assert result["offered_rate"] == pytest.approx(100.0)
    assert 0 < result["mean_ttft_ms"] <= result["p99_ttft_ms"] <= result["p99_e2el_ms"]
    assert (result["is_tinfer"], result["trace"]) == (True, True)
    assert result["client_cpu_share"] > 0
    records = result["records"]
    assert len(records) == 12
    assert {record["trace"]["route"] for record in records} == {"split"}
    assert all(record["trace"]["output_tokens"] == 5 for record in records)
    asyncio.run(server.idle())


def test_a_table_beside_the_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = bench(
        *("--base-url", server.url, *SMALL, "--num-prompts", "4", "--no-trace"),
        *("--metric-percentiles", "50,99.9", "--percentile-metrics", "ttft,itl"),
        *("--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    assert "Successful requests:                     4" in done.stdout
    assert "P99.9 ITL (ms):" in done.stdout and "TPOT" not in done.stdout
    assert "req/s" not in done.stderr  # no progress bar where nobody watches
    result = json.loads(path.read_text())
    assert "records" not in result and "p99.9_ttft_ms" in result
    assert (result["trace"], result["request_rate"], result["offered_rate"]) == (False, "inf", None)


def test_a_workload_by_name(server: Server) -> None:
    done = bench(
        *("--base-url", server.url, "--workload", "Mixed", "--num-prompts", "5"),
        *("--length-scale", "0.02", "--request-rate", "50", "--json", "-", "--save-detailed"),
    )
    result = result_of(done)
    assert result["completed"] == 5
    assert {record["task"] for record in result["records"]} <= {"LPLD", "LPHD", "HPLD", "HPHD"}


def test_failures_are_told_and_a_run_of_failures_only_is_code_1(server: Server) -> None:
    done = bench(
        *("--base-url", server.url, *SMALL, "--num-prompts", "3", "--endpoint", "/v1/nothing"),
        *("--json", "-"),
    )
    result = result_of(done, code=1)
    assert (result["completed"], result["failed"]) == (0, 3)
    assert result["status_counts"] == {"404": 3}
    assert sum(result["error_counts"].values()) == 3
    assert result["mean_ttft_ms"] is None
    assert "tinfer: warning: 3 requests failed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "other"), "does not serve other"),
        (("--json", "/no/such/folder/result.json"), "cannot write /no/such/folder/result.json"),
        (("--workload", "nonsense"), "no workload is called nonsense"),
        (("--workload", "Mixed", "--workload-option", "x=1"), "workload Mixed"),
        (("--input-len", "10000000"), "too long"),
        ((*SMALL, "--num-warmups", "2", "--endpoint", "/v1/nothing"), "warm-up requests failed"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    server: Server, arguments: tuple[str, ...], words: str
) -> None:
    done = bench("--base-url", server.url, "--num-prompts", "1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinfer: ") and words in line


def test_nobody_there_is_one_line() -> None:
    done = bench("--base-url", "http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tinfer: nothing answers at http://127.0.0.1:9")


def test_ctrl_c_ends_with_what_came_and_frees_the_server(server: Server, tmp_path: Path) -> None:
    long = ("--input-len", "20", "--output-len", "20000")
    path = tmp_path / "result.json"
    with on_terminal(
        ROOT,
        *(*BENCH, "--base-url", server.url, *long, "--num-prompts", "3"),
        *("--request-rate", "0.001", "--json", str(path)),
    ) as program:
        program.see("requests:   0%")
        program.type(CTRL_C)
        assert program.wait_end() == 130, program.screen
        assert "Serving Benchmark Result (interrupted)" in program.screen
    result = json.loads(path.read_text())
    assert (result["interrupted"], result["completed"], result["failed"]) == (True, 0, 0)
    assert result["num_interrupted"] + result["num_not_sent"] == 3
    asyncio.run(until_idle(server.url))


def test_ctrl_c_cuts_what_is_under_way(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with on_terminal(
        ROOT,
        *(*BENCH, "--base-url", server.url, "--input-len", "20", "--output-len", "20000"),
        *("--num-prompts", "3", "--json", str(path), "--save-detailed"),
    ) as program:
        asyncio.run(server.until_phase(decoding=3))
        program.type(CTRL_C)
        assert program.wait_end() == 130, program.screen
    result = json.loads(path.read_text())
    assert (result["num_interrupted"], result["num_not_sent"]) == (3, 0)
    assert len(result["records"]) == 3
    asyncio.run(until_idle(server.url))
