"""The doctor on the box at hand: real probes, a live server beside it, and a dead one's remains."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.e2e.serving import ServeProcess, wait_gone
from tests.process.box import Server, running
from tests.process.load import completion
from tinfer.doctor import engine, leftovers, peers, ports, shared_memory
from tinfer.doctor.examination import Examination
from tinfer.doctor.finding import Finding
from tinfer.doctor.leftovers import Leftovers
from tinfer.doctor.processes import Orphan

# Its slowest part is importing the engine, which has a deadline of its own.
DOCTOR_DEADLINE_S = 180.0
FAST = {"step_s": 0.0, "num_blocks": 4096, "block_tokens": 16}
ANSWER = """
import json, os
answer = os.dup(1)
os.dup2(2, 1)
print("noise")
os.write(answer, json.dumps({"torch": os.environ["SAY"]}).encode())
"""


def test_another_process_reads_our_memory() -> None:
    finding = shared_memory.probe(4 << 20)
    assert finding.level == "ok", finding
    assert "GB/s" in finding.found


def test_a_reader_that_fails_says_why() -> None:
    with contextlib.closing(socket.socket()) as no_memory:
        copied = shared_memory.read_elsewhere(no_memory.fileno(), 1 << 20)
    assert copied.error and not copied.digest


def test_scripts_answer_fail_or_are_late() -> None:
    environ = {**os.environ, "SAY": "2.13"}
    assert engine.run_script(ANSWER, environ, 30.0) == engine.Imported(torch="2.13")
    failed = engine.run_script("import no_such_engine", environ, 30.0)
    assert failed.error == "ModuleNotFoundError: No module named 'no_such_engine'"
    assert engine.run_script("import os; os._exit(3)", environ, 30.0).error == "it ended with 3"
    late = engine.run_script("import signal; signal.pause()", environ, 0.2)
    assert late.error == "not done after 0 s"


def test_the_workers_probe_is_understood() -> None:
    """It answers on any box; where torch sees no GPU, with that as the reason."""
    (tried,) = peers.run_probe([(0, 0)], os.environ, 50.0)
    assert tried.ok != bool(tried.reason)
    assert not tried.reason.startswith("the probe"), tried.reason


def test_the_port_and_its_holder() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert ports.try_port("127.0.0.1", port).level == "ok"
        listener.listen()
        finding = ports.try_port("127.0.0.1", port)
    assert finding.level == "warning"
    assert f"pid {os.getpid()} " in finding.found


@contextlib.contextmanager
def orphaned(folder: Path) -> Iterator[tuple[Path, list[psutil.Process]]]:
    """What a server leaves whose master is killed while import process and worker are stopped:
    its run directory, and those two."""
    folder.mkdir()
    with running(folder, FAST) as server:
        run_dir = server.process.run_dir()
        by_pid = {process.pid: process for process in server.family}
        workers = sorted(p.pid for p in server.family if "--lifeline" in p.cmdline())
        zygote = next(pid for pid in workers if by_pid[pid].ppid() == server.master.pid)
        left = [by_pid[zygote], by_pid[next(pid for pid in workers if pid != zygote)]]
        try:
            for process in left:
                process.send_signal(signal.SIGSTOP)
            server.process.kill()
            yield run_dir, left
        finally:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            assert wait_gone(server.family) == []


def pids_in(left: Leftovers) -> set[int]:
    return {orphan.pid for orphan in left.orphans}


def doctor(*arguments: str) -> tuple[int, Examination]:
    done = subprocess.run(
        [sys.executable, "-m", "tinfer", "doctor", "--json", "-", *arguments],
        capture_output=True,
        check=False,
        timeout=DOCTOR_DEADLINE_S,
    )
    assert done.stderr == b""
    return done.returncode, msgspec.json.decode(done.stdout, type=Examination)


def about(findings: list[Finding], word: str) -> list[str]:
    return [f.level for f in findings if f.check == leftovers.CHECK and word in f.found]


async def answers(server: Server) -> None:
    request = completion([1, 2, 3], max_tokens=4)
    await server.answer(request)
    request.check_answered(server.settings)


@pytest.mark.timeout(240)  # two servers, and the whole examination with its import of the engine
async def test_a_dead_servers_remains_go_and_the_live_one_beside_serves_on(tmp_path: Path) -> None:
    with running(tmp_path, FAST) as server:
        live_dir = server.process.run_dir()
        live = {process.pid for process in server.family}
        with orphaned(tmp_path / "dead") as (run_dir, processes):
            pids = {process.pid for process in processes}
            left = leftovers.look_twice()
            assert pids_in(left) >= pids and not pids_in(left) & live
            assert run_dir in left.run_dirs and live_dir not in left.run_dirs
            assert {p.status() for p in processes} == {psutil.STATUS_STOPPED}, "only looked at"
            _, report = doctor("--fix")
            for pid in pids:
                assert about(report.findings, f"pid {pid}:") == ["ok"], report
            assert about(report.findings, str(run_dir)) == ["ok"]
            assert about(report.findings, str(live_dir)) == []
            assert wait_gone(processes) == []
            assert not run_dir.exists()
        assert {process.pid for process in server.process.family()} == live
        await answers(server)
        await server.idle()


def test_a_server_that_starts_or_serves_is_never_a_leftover(tmp_path: Path) -> None:
    """Looked at over and over from its first moment to its last."""
    seen: set[int] = set()
    process = ServeProcess(tmp_path, "--engine", "fake")
    try:
        while "serves" not in process.output:
            assert process.process.poll() is None, process.output
            seen |= pids_in(leftovers.look()) & {p.pid for p in process.family()}
        process.wait_ready()
        assert process.run_dir() not in leftovers.look().run_dirs
    finally:
        process.stop()
    assert seen == set()


def test_a_process_that_is_no_orphan_any_more_is_not_killed() -> None:
    """Between look and deed its id may have gone to somebody else."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        orphan = Orphan(child.pid, 1, "worker", "/run/tinfer-x")
        other = msgspec.structs.replace(orphan, start_ticks=2)
        for left in (Leftovers(), Leftovers((other,))):
            finding = leftovers.end_orphan(
                orphan, see=functools.partial(Leftovers.both, left, left)
            )
            assert "left alone" in finding.found
            assert child.poll() is None
        finding = leftovers.end_orphan(orphan, see=lambda: Leftovers((orphan,)))
        assert (finding.level, finding.found) == ("ok", f"worker, pid {child.pid}: ended")
        assert child.wait() == -signal.SIGKILL
    assert "has ended" in leftovers.end_orphan(orphan).found
