"""Servers that share a box with each other, with other users and with small containers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import ServeProcess, serving, wait_gone
from tests.process.box import Server, running
from tests.process.load import completion, fake_flags
from tests.process.privileges import NOBODY, unprivileged
from tinfer.master.cores import CoreClaims, usable_cores
from tinfer.master.rundir import run_directories
from tinfer.worker.fake_settings import FakeSettings


async def test_two_servers_side_by_side(tmp_path: Path) -> None:
    """Each has its own port, run directory and workers; the end of one does not touch the other."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with running(folders[0], {}) as first, running(folders[1], {}) as second:
        assert first.url != second.url
        found = {directory.pid: directory for directory in run_directories()}
        for server in (first, second):
            mine = found[server.process.process.pid]
            assert mine.path == server.process.run_dir()
            assert (mine.alive, mine.port) == (True, int(server.url.rpartition(":")[2]))
        for server in (first, second):
            request = completion([5] * 20, max_tokens=4)
            await server.answer(request)
            request.check_answered(server.settings)
        first.stop()
        request = completion([6] * 20, max_tokens=4)
        await second.answer(request)
        request.check_answered(second.settings)
        second.stop()


async def test_the_second_server_takes_other_cores_or_says_that_it_shares(tmp_path: Path) -> None:
    """Whatever else runs on this box: what this process claims counts as another server's."""
    cores = usable_cores()
    claims = CoreClaims(cores)
    try:
        held = set(claims.take(1, len(cores.numbers)))
        with running(tmp_path, {}, prefill=1, decode=1) as server:
            words = re.search(r"shares core ([0-9, ]+) with another tinfer", server.process.output)
            pinned = _pinned(server)
            shared = {int(word) for word in words.group(1).split(",")} if words else set()
            assert pinned & held <= shared
            # All cores that were free are held by this process now.
            assert shared == pinned
    finally:
        claims.close()


def _pinned(server: Server) -> set[int]:
    """The cores of the workers, whose processes are the import process's children."""
    workers = server.process.family()[2:]
    assert len(workers) == 2
    return set().union(*(os.sched_getaffinity(worker.pid) for worker in workers))


# --- another user ---------------------------------------------------------------------------------


@pytest.fixture
def home() -> Iterator[Path]:
    """A place where an unprivileged user may write; pytest's folders are its own user's alone."""
    folder = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
    for name in ("home", "tmp", "logs"):
        (folder / name).mkdir()
    if unprivileged():
        for path in (folder, *folder.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("has_home", [True, False])
async def test_an_unprivileged_user(tmp_path: Path, home: Path, has_home: bool) -> None:
    """With the runtime directory of another user in the environment, as `su` leaves it; where the
    tests do not run as root it is their own user that has neither home nor runtime directory."""
    environment = {
        "HOME": str(home / "home") if has_home else "/nonexistent",
        "TMPDIR": str(home / "tmp"),
        "XDG_RUNTIME_DIR": "/run/user/0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    flags = fake_flags({}, log_dir=home / "logs")
    with serving(tmp_path, *flags, environment=environment, prefix=unprivileged()) as process:
        server = Server(process, FakeSettings())
        if unprivileged():
            assert {p.uids().effective for p in process.family()} == {NOBODY}
        assert process.run_dir().parent == home / "tmp"
        request = completion([5] * 20, max_tokens=4)
        await server.answer(request)
        request.check_answered(server.settings)
        await server.idle(num_finished=1)
        family = process.family()
        process.kill()
        assert wait_gone(family) == []
    assert _without_caches(home / "tmp") == []


def test_a_privileged_port(tmp_path: Path, home: Path) -> None:
    """Port 1 where it needs a right that this user has not; else it can be bound, and is."""
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    is_free = first <= 1 or (os.geteuid() == 0 and not unprivileged())
    flags = [*fake_flags({}, prefill=1, decode=0, log_dir=home / "logs"), "--port", "1"]
    environment = {"TMPDIR": str(home / "tmp"), "HOME": str(home / "home")}
    server = ServeProcess(tmp_path, *flags, environment=environment, prefix=unprivileged())
    try:
        if is_free:
            server.wait_ready()
            server.process.send_signal(signal.SIGINT)
            assert server.wait_end() == 0
        else:
            assert server.wait_end() == 2
            assert server.error_line == (
                f"tinfer: port 1 is for privileged users only; choose a --port from {first} up"
            )
    finally:
        server.stop()


def _without_caches(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if not p.name.startswith("torchinductor_")]
