"""`tinfer bench frontend` end to end: masters of fake engines, the bare relay, fakes of vLLM."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.process.terminal import CTRL_C, on_terminal

ROOT = Path(__file__).resolve().parents[2]
FAKE_VLLM = shlex.join([sys.executable, str(ROOT / "tests" / "process" / "fake_vllm.py")])
FRONTEND = (sys.executable, "-m", "tinfer", "bench", "frontend")
SMALL = ("--streams", "2,8", "--rate", "2000", "--seconds", "0.2", "--num-requests", "70")


def frontend(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FRONTEND, *SMALL, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(240)
def test_masters_beside_the_relay_and_vllm(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = frontend(
        *("--arms", "master-whole,master-split,relay,vllm-1", "--vllm-command", FAKE_VLLM),
        *("--repetitions", "1", "--json", str(path), "--plot", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["ended_early"] is None
    points = {
        (one["arm"], one["point"]["what"], one["point"]["mode"]) for one in result["measured"]
    }
    for arm in ("master-whole", "master-split", "relay"):
        assert points >= {(arm, "tokens", "paced"), (arm, "tokens", "full")}
        assert points >= {(arm, "requests", "full"), (arm, "unloaded", "unloaded")}
        assert ((arm, "prompts", "paced") in points) == (arm != "relay")
    assert {point for point in points if point[0] == "vllm-1"} == {
        ("vllm-1", "tokens", "full"),
        ("vllm-1", "requests", "full"),
    }
    for one in result["measured"]:
        asked = one["point"]["num_requests"] * one["point"]["output_tokens"]
        assert one["num_tokens"] == asked >= one["num_events"] > 0
        assert one["front_s"] > 0 and one["engines_s"] >= 0 and one["client_s"] > 0
        assert (one["longest_lag_ms"] is not None) == (one["point"]["what"] == "prompts")
    found = {(one["arm"], one["to"], one["what"]) for one in result["ratios"]}
    assert ("master-split", "relay", "tokens") in found
    assert ("master-whole", "vllm", "requests") in found
    assert "Ratios" in done.stdout and (tmp_path / "per_token.png").stat().st_size > 5000


def test_the_relay_answers_as_tinfer_does() -> None:
    """Event by event: what is in it, and in which order."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    argv = [sys.executable, "-m", "tinfer.bench.frontend.relay", "--port", str(port)]
    with subprocess.Popen(argv) as relay:
        try:
            url = f"http://127.0.0.1:{port}"
            _until_healthy(url)
            body = {"model": "compared", "prompt": [1, 2, 3], "max_tokens": 4}
            asked = urllib.request.Request(
                f"{url}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=10) as response:
                events = response.read().decode().split("\n\n")
        finally:
            children = psutil.Process(relay.pid).children()
            relay.send_signal(signal.SIGTERM)
            relay.wait(10)
    assert len(children) == 2 and not any(child.is_running() for child in children)
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None, None, None, "length"]
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert chunks[-1]["usage"] == counts and chunks[-1]["choices"] == []
    assert list(chunks[0]["choices"][0]) == [
        *("index", "text", "logprobs", "finish_reason", "stop_reason"),
        *("prompt_token_ids", "token_ids"),
    ]


def _until_healthy(url: str) -> None:
    for _ in range(200):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    pytest.fail("the relay does not answer")


def test_a_server_that_fails_on_the_way_ends_it_with_what_there_is() -> None:
    # It has 16 requests to warm up, a point of two streams, and dies within the next.
    command = f"{FAKE_VLLM} --die-after 20"
    done = frontend(
        *("--arms", "vllm-1", "--vllm-command", command, "--repetitions", "1", "--json", "-")
    )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert [one["point"]["streams"] for one in result["measured"]] == [2]
    assert "vllm-1" in result["ended_early"] and "not complete: vllm-1" in done.stderr


def test_a_server_that_does_not_start_is_one_line() -> None:
    done = frontend("--arms", "vllm-2", "--vllm-command", f"{FAKE_VLLM} --start-fails")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tinfer:")]
    assert "did not start (exit code 3)" in line


def test_ctrl_c_reports_what_there_is_and_leaves_no_server() -> None:
    words = (*SMALL, "--arms", "relay", "--repetitions", "50")
    with on_terminal(ROOT, *FRONTEND[1:], *words) as program:
        program.see("relay, full")
        program.see("tokens x")
        before = psutil.Process(program.process.pid).children(recursive=True)
        program.type(CTRL_C)
        assert program.wait_end() == 130, program.screen
        assert "not complete: interrupted" in program.screen and "At a pace" in program.screen
    assert before and not any(child.is_running() for child in before)
