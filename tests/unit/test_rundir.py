"""A run directory goes with its server; one that stayed is told from a live one's."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinfer.errors import StartError
from tinfer.master import rundir
from tinfer.master.rundir import (
    MAX_SOCKET_PATH_BYTES,
    OWNER_FILE,
    FoundDirectory,
    RunDirectory,
    run_directories,
    start_ticks,
)

ROOT = Path(__file__).resolve().parents[2]
HOLDER = (
    "import sys\nfrom tinfer.master.rundir import RunDirectory\n"
    "run = RunDirectory(4321)\nrun.make()\nprint(run.path, flush=True)\nsys.stdin.read()\n"
)


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine of its own, with a runtime and a temporary directory next to each other."""
    # Short, since socket paths below it have a limit; tmp_path is not.
    with tempfile.TemporaryDirectory(prefix="b") as name:
        folder = Path(name)
        (folder / "run").mkdir()
        (folder / "tmp").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        yield folder


def directories(box: Path) -> list[FoundDirectory]:
    """What is found, but for those of servers that this machine runs beside the tests."""
    return [one for one in run_directories() if one.path.is_relative_to(box)]


def made(port: int = 0) -> RunDirectory:
    run = RunDirectory(port)
    run.make()
    return run


def test_it_is_not_there_before_it_is_made(box: Path) -> None:
    run = RunDirectory()
    assert list((box / "run").iterdir()) == []
    run.remove()
    run.make()
    assert list((box / "run").iterdir()) == [run.path]
    run.remove()


def test_it_is_private_holds_sockets_and_goes_whole(box: Path) -> None:
    run = made(80)
    assert run.path.parent == box / "run"
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert Path(run.socket_path).parent == run.path
    assert Path(run.temp_path).is_dir()
    Path(run.temp_path, "left").touch()
    run.remove()
    run.remove()
    assert list((box / "run").iterdir()) == []


def test_an_owner_record_names_the_process_and_the_port(box: Path) -> None:
    run = made(80)
    try:
        (found,) = directories(box)
        assert found == FoundDirectory(run.path, os.getpid(), 80, True)
        record = json.loads((run.path / OWNER_FILE).read_text())
        assert record["start_ticks"] == start_ticks(os.getpid())
        assert record["boot_id"]
    finally:
        run.remove()
    assert directories(box) == []


def test_a_killed_servers_directory_is_found_dead(box: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(box / "tmp"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert directories(box) == [FoundDirectory(path, process.pid, 4321, True)]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert directories(box) == [FoundDirectory(path, process.pid, 4321, False)]


def test_a_live_process_of_that_pid_that_started_at_another_time_is_no_owner(box: Path) -> None:
    owner = rundir.Owner.this_process(1)
    assert owner.lives()
    assert not rundir.Owner(owner.pid, owner.start_ticks - 1, owner.boot_id, 1).lives()
    assert not rundir.Owner(owner.pid, owner.start_ticks, "an earlier boot", 1).lives()


def test_what_is_none_of_ours_is_left_out(box: Path) -> None:
    for name in ("tinfer-without", "tinfer-broken", "other"):
        (box / "tmp" / name).mkdir()
    (box / "tmp" / "tinfer-broken" / OWNER_FILE).write_text("{")
    (box / "tmp" / "tinfer-file").touch()
    with tempfile.TemporaryDirectory(prefix="t") as elsewhere:
        (Path(elsewhere) / OWNER_FILE).write_text('{"pid":1,"start_ticks":1,"boot_id":"","port":1}')
        (box / "tmp" / "tinfer-link").symlink_to(elsewhere)
        assert directories(box) == []


@pytest.mark.parametrize("why", ["unset", "missing", "too long", "another's"])
def test_an_unfit_runtime_directory_gives_way_to_the_temporary_one(
    box: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    match why:
        case "unset":
            monkeypatch.delenv("XDG_RUNTIME_DIR")
        case "missing":
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(box / "nowhere"))
        case "too long":
            long = box / ("x" * MAX_SOCKET_PATH_BYTES)
            long.mkdir()
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
        case "another's":
            real = os.geteuid()
            monkeypatch.setattr(
                rundir, "_owner_uid", lambda path: real + 1 if path.endswith("run") else real
            )
    run = made()
    try:
        assert run.path.parent == box / "tmp"
        assert [found.path for found in directories(box)] == [run.path]
    finally:
        run.remove()


def test_a_directory_that_nobody_can_use_is_said_in_one_line(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "MAX_SOCKET_PATH_BYTES", 20)
    with pytest.raises(StartError, match=r"^no place for sockets: .* exceed 20 bytes .*run"):
        RunDirectory()


def test_a_full_disk_leaves_nothing_half_made(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StartError, match=r"cannot make a run directory in .*No space left"):
        made()
    assert list((box / "run").iterdir()) == []


def test_socket_paths_fit_even_for_a_rank_that_makes_its_own(box: Path) -> None:
    run = made()
    try:
        name = "12345678-1234-1234-1234-123456789abc"
        assert len(os.fsencode(Path(run.temp_path, name))) <= MAX_SOCKET_PATH_BYTES
    finally:
        run.remove()
