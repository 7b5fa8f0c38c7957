"""A server that cannot start says why in one line, ends with code 2 and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.serving import ServeProcess, run_to_end
from tests.process.box import running
from tests.process.load import completion, fake_flags


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ({"step_s": -1.0}, "fake engine: Expected `float` >= 0.0 - at `$.step_s`"),
        (
            {"num_blocks": 4, "block_tokens": 4, "max_model_len": 17},
            "fake engine: 4 blocks of 4 tokens hold no request of max_model_len 17",
        ),
    ],
)
def test_what_the_worker_cannot_do_with(
    tmp_path: Path, fake: dict[str, float], reason: str
) -> None:
    code, line = run_to_end(tmp_path, *fake_flags(fake, prefill=1, decode=0))
    assert code == 2
    assert line.startswith("tinfer: worker prefill-0 (core ")
    assert line.endswith(f") cannot start: {reason}")


@pytest.mark.parametrize("timeout", ["0.01", "1.5"])  # before and after the workers' forks
def test_workers_that_are_too_slow(tmp_path: Path, timeout: str) -> None:
    flags = fake_flags({"start_s": 1000.0}, start_timeout=timeout, prefill=2, decode=1)
    code, line = run_to_end(tmp_path, *flags)
    assert code == 2
    assert line.endswith(f"cannot start: not ready after {timeout} s")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], "no such model directory (nor a hub's org/name): /nowhere/at/all"),
        (["--log-dir", "/nowhere/at/all"], "cannot start the import process: "),
        (["--host", "256.1.1.1"], "address 256.1.1.1:0 cannot be used"),
    ],
)
def test_what_the_master_cannot_do_with(tmp_path: Path, arguments: list[str], words: str) -> None:
    code, line = run_to_end(tmp_path, "--engine", "fake", *arguments)
    assert code == 2
    assert line.startswith(f"tinfer: {words}")


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    code, line = run_to_end(tmp_path, "--engine", "fake", str(model))
    assert (code, line) == (
        2,
        f"tinfer: not a Hugging Face model, config.json is missing: {model}",
    )


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = run_to_end(tmp_path, "--engine", "fake", "--port", str(port))
    holder = f"process {os.getpid()} ({psutil.Process().name()})"
    assert code == 2
    assert line.startswith(f"tinfer: address 127.0.0.1:{port} is in use by {holder}; ")


def test_a_port_of_a_server_that_still_starts(tmp_path: Path) -> None:
    """It is taken from the first moment, so the second learns of it before it loads anything."""
    server = ServeProcess(tmp_path, *fake_flags({"start_s": 1000.0}, prefill=1, decode=0))
    try:
        server.wait_progress("starting workers")
        (port,) = {
            c.laddr.port for c in server.family()[0].net_connections("tcp") if c.status == "LISTEN"
        }
        second = tmp_path / "second"
        second.mkdir()
        code, line = run_to_end(second, "--engine", "fake", "--port", str(port))
        assert code == 2
        assert f"127.0.0.1:{port} is in use by process {server.process.pid} (" in line
    finally:
        server.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_it_starts(tmp_path: Path, number: signal.Signals) -> None:
    server = ServeProcess(tmp_path, *fake_flags({"start_s": 1000.0}, prefill=1, decode=1))
    try:
        server.wait_progress("starting workers")
        server.process.send_signal(number)
        assert server.wait_end() == 0
        assert "serves" not in server.output
    finally:
        server.stop()


def test_a_worker_that_dies_while_it_starts(tmp_path: Path) -> None:
    """Before it has ever served, a death is a reason not to start."""
    server = ServeProcess(tmp_path, *fake_flags({"start_s": 1000.0}, prefill=1, decode=0))
    try:
        server.wait_progress("starting workers")
        deadline_s = time.monotonic() + 20
        while len(family := server.family()) < 3:
            assert time.monotonic() < deadline_s
        os.kill(family[2].pid, signal.SIGKILL)
        assert server.wait_end() == 2
        assert server.error_line.endswith("cannot start: killed by SIGKILL")
    finally:
        server.stop()


async def test_workers_that_die_again_and_again_are_given_up(tmp_path: Path) -> None:
    """Each dies in its second step of every life; the server outlives them, and says so."""
    fake = {"die_after_steps": 2, "mean_output_tokens": 1000}
    with running(tmp_path, fake, max_worker_restarts=2) as server:
        num_sent = num_refused = 0
        while True:
            workers = await server.workers()
            if all(worker["state"] == "given-up" for worker in workers.values()):
                break
            request = completion([5] * 20, max_tokens=50)
            await server.answer(request)
            num_sent += 1
            assert request.error is not None
            message = request.error["message"]
            num_refused += message == "no worker is up"
            if message != "no worker is up":
                assert "workers in a row died" in message or message.endswith("none will come")
                request.check_so_far(server.settings)
        for worker in workers.values():
            assert (worker["generation"], worker["restarts"]) == (3, 2)
            assert worker["reason"] == "exit code 86"
        await server.idle(num_finished=num_sent - num_refused)
        assert server.process.process.poll() is None
        server.stop()
