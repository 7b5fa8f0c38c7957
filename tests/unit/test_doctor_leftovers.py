"""What the doctor takes for a leftover, on made-up /proc and /dev/shm; and above all what not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tinfer.doctor.finding import Finding, ok
from tinfer.doctor.leftovers import Leftovers, describe, look, look_twice, remove
from tinfer.doctor.processes import Orphan, find_orphans
from tinfer.master.rundir import OWNER_FILE, Owner, RunDirectory

READ, WRITE, BOTH = "0100000", "0100001", "0100002"
MASTER, ZYGOTE, WORKER, RANK = 100, 101, 102, 103
WORKER_WORDS = ("python", "-m", "tinfer.worker", "--control", "4", "--lifeline", "5")


class Box:
    """A /proc with processes put in by hand."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc

    def add(
        self, pid: int, parent: int, words: tuple[str, ...] = ("python",), state: str = "S"
    ) -> Path:
        folder = self.proc / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "fdinfo").mkdir()
        rest = " ".join(["0"] * 17)
        (folder / "stat").write_text(f"{pid} (odd ) name) {state} {parent} {rest} {pid * 10} 0\n")
        (folder / "cmdline").write_text("\0".join(words) + "\0")
        return folder

    def open(self, pid: int, fd: int, target: str, flags: str = READ) -> None:
        folder = self.proc / str(pid)
        (folder / "fd" / str(fd)).symlink_to(target)
        (folder / "fdinfo" / str(fd)).write_text(f"pos:\t0\nflags:\t{flags}\nmnt_id:\t15\n")

    def kill(self, pid: int) -> None:
        self.proc.joinpath(str(pid)).rename(self.proc / f"gone-{pid}")

    def orphans(self) -> list[int]:
        return sorted(orphan.pid for orphan in find_orphans(self.proc))


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A server: master, import process, a worker and one rank of it; other processes beside."""
    box = Box(tmp_path / "proc")
    words = (*WORKER_WORDS, "--run-dir", "/run/tinfer-abcdefgh")
    box.add(1, 0, ("init",))
    box.add(MASTER, 1, ("python", "-m", "tinfer", "serve"))
    box.add(ZYGOTE, MASTER, words)
    box.add(WORKER, ZYGOTE, words)
    box.add(RANK, WORKER, ("VLLM::Worker_TP0",))
    box.add(200, 1, ("python", "-m", "tinfer.worker.kv.probe"))
    box.open(MASTER, 8, "pipe:[77]", READ)
    box.open(MASTER, 9, "pipe:[77]", WRITE)
    for pid in (ZYGOTE, WORKER):
        box.open(pid, 3, "socket:[9]", BOTH)
        box.open(pid, 5, "pipe:[77]")
    box.open(200, 5, "pipe:[66]")
    return box


def test_a_live_server_has_no_orphans(box: Box) -> None:
    assert box.orphans() == []


def test_without_its_master_every_process_of_it_is_one(box: Box) -> None:
    box.kill(MASTER)
    run_dir = "/run/tinfer-abcdefgh"
    found = sorted(find_orphans(box.proc), key=lambda orphan: orphan.pid)
    assert found == [
        Orphan(ZYGOTE, ZYGOTE * 10, "import process or worker", run_dir),
        Orphan(WORKER, WORKER * 10, "worker", run_dir),
        Orphan(RANK, RANK * 10, "process of a worker", run_dir),
    ]


def test_reading_ends_do_not_keep_a_lifeline(box: Box) -> None:
    """Workers have only those; one of them must not pass for a master."""
    box.kill(MASTER)
    box.open(200, 6, "pipe:[77]", READ)
    assert box.orphans() == [ZYGOTE, WORKER, RANK]
    box.open(200, 7, "pipe:[77]", WRITE)
    assert box.orphans() == []


def test_a_server_beside_a_dead_one_is_left_alone(box: Box) -> None:
    words = (*WORKER_WORDS, "--run-dir", "/run/tinfer-other")
    box.add(300, 1, ("python", "-m", "tinfer", "serve"))
    box.add(301, 300, words)
    box.open(300, 4, "pipe:[88]", WRITE)
    box.open(301, 5, "pipe:[88]")
    box.kill(MASTER)
    assert box.orphans() == [ZYGOTE, WORKER, RANK]


def test_a_worker_below_a_live_server_is_no_orphan_of_a_dead_parent(box: Box) -> None:
    """A server started by a worker's child, as a test might: its own lifeline decides."""
    box.add(400, RANK, ("python", "-m", "tinfer", "serve"))
    box.add(401, 400, WORKER_WORDS)
    box.open(400, 4, "pipe:[99]", WRITE)
    box.open(401, 5, "pipe:[99]")
    box.kill(MASTER)
    assert 401 not in box.orphans()


@pytest.mark.parametrize("state", ["Z", "X"])
def test_what_has_ended_is_not_counted(box: Box, state: str) -> None:
    box.kill(MASTER)
    box.kill(WORKER)
    box.kill(RANK)
    stat = box.proc / str(ZYGOTE) / "stat"
    stat.write_text(stat.read_text().replace(" S ", f" {state} "))
    assert box.orphans() == []


def test_without_a_lifeline_nothing_is_proved(box: Box) -> None:
    box.kill(MASTER)
    for pid in (ZYGOTE, WORKER):
        (box.proc / str(pid) / "fd" / "5").unlink()
    assert box.orphans() == []


def test_a_process_that_cannot_be_looked_into_might_be_the_master(box: Box) -> None:
    box.kill(MASTER)
    assert box.orphans()
    folder = box.add(500, 1) / "fd"
    folder.rmdir()
    folder.touch()
    assert box.orphans() == []


def test_a_spawned_worker_says_where_it_belongs(box: Box) -> None:
    box.kill(MASTER)
    spec = '{"worker_id":"prefill-0","socket_path":"/run/tinfer-x/workers.sock"}'
    for pid, words in ((600, spec), (601, "[1"), (602, "[1]")):
        box.add(pid, 1, (*WORKER_WORDS, "--spec", words))
        box.open(pid, 5, "pipe:[11]")
    found = {orphan.pid: orphan for orphan in find_orphans(box.proc)}
    assert found[600] == Orphan(600, 6000, "worker", "/run/tinfer-x")
    assert (found[601].run_dir, found[602].run_dir) == (None, None)


# --- run directories ------------------------------------------------------------------------------


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for run directories, with a short path: sockets have to fit."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture
def alive(runtime: Path) -> Iterator[Path]:
    """The run directory of a server that lives: this process."""
    directory = RunDirectory()
    directory.make()
    try:
        assert directory.path.parent == runtime
        yield directory.path
    finally:
        directory.remove()


def dead_run(runtime: Path, name: str = "tinfer-deadbeef") -> Path:
    """A run directory of before the last boot."""
    path = runtime / name
    (path / "tmp").mkdir(parents=True)
    owner = Owner(pid=1, start_ticks=1, boot_id="an earlier boot", port=8000)
    (path / OWNER_FILE).write_bytes(msgspec.json.encode(owner))
    return path


def seen_in(runtime: Path, left: Leftovers) -> Leftovers:
    """What belongs to this test; the box may have dead runs of others."""
    dirs = tuple(path for path in left.run_dirs if path.parent == runtime)
    return msgspec.structs.replace(left, orphans=(), run_dirs=dirs)


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_dead_runs_go_and_live_ones_stay(runtime: Path, alive: Path, tmp_path: Path) -> None:
    dead = dead_run(runtime)
    shm = tmp_path / "shm"
    shm.mkdir()
    ours = {f"{dead.name}.12.aa", f"sem.{dead.name}.12.bb"}
    others = {f"{alive.name}.9.aa", f"{dead.name}x.1.a", "psm_12345678", "sem.mp-abc", dead.name}
    for name in ours | others:
        (shm / name).touch()
    (runtime / "tinfer-notours").mkdir()
    (runtime / "tinfer-link").symlink_to(dead)
    left = seen_in(runtime, look(shm))
    assert left.run_dirs == (dead,)
    assert {path.name for path in left.shm_files} == ours
    (finding,) = describe(left)
    assert (finding.level, "2 files in /dev/shm" in finding.found) == ("warning", True)
    assert levels(remove(left)) == ["ok"]
    assert not dead.exists()
    assert {path.name for path in shm.iterdir()} == others
    assert alive.is_dir() and (runtime / "tinfer-notours").is_dir()


def test_a_run_that_came_to_life_meanwhile_is_not_removed(runtime: Path, alive: Path) -> None:
    (finding,) = remove(Leftovers(run_dirs=(alive,)))
    assert finding.level == "fault"
    assert alive.is_dir()


def test_orphans_count_only_where_their_run_is_dead_or_gone(
    runtime: Path, alive: Path, box: Box
) -> None:
    dead = dead_run(runtime)
    elsewhere = runtime / "not-a-run"
    elsewhere.mkdir()
    for pid, folder in ((700, dead), (701, alive), (702, elsewhere), (703, runtime / "gone")):
        box.add(pid, 1, (*WORKER_WORDS, "--run-dir", str(folder)))
        box.open(pid, 5, "pipe:[12]")
    box.add(704, 1, WORKER_WORDS)
    box.open(704, 5, "pipe:[12]")
    assert sorted(orphan.pid for orphan in look(proc=box.proc).orphans) == [700, 703]


ORPHAN = Orphan(7, 70, "worker", "/run/tinfer-a")


def test_what_goes_by_itself_is_no_leftover() -> None:
    """A server that is just ending is seen once, not twice; an id that is used again is not the
    same process, one whose parent has gone is."""
    renamed = Orphan(7, 70, "import process or worker", "/run/tinfer-a")
    path = Path("/run/tinfer-a")
    looks = [
        Leftovers((ORPHAN, Orphan(8, 80, "worker", None)), (path, Path("/run/tinfer-b"))),
        Leftovers((renamed, Orphan(8, 81, "worker", None)), (path,), (Path("/dev/shm/x"),)),
    ]
    waits: list[float] = []
    left = look_twice(lambda: looks[len(waits)], waits.append)
    assert left == Leftovers((ORPHAN,), (path,))
    assert len(waits) == 1


def test_a_clean_box_is_looked_at_once() -> None:
    waits: list[float] = []
    left = look_twice(Leftovers, waits.append)
    assert not left and not waits
    assert levels(describe(left)) == ["ok"]


def test_orphans_are_faults_until_they_have_ended() -> None:
    left = Leftovers((ORPHAN,))
    (found,) = describe(left)
    assert (found.level, "pid 7" in found.found, "--fix" in found.advice) == ("fault", True, True)
    assert remove(left, lambda orphan: ok("leftovers", f"{orphan.pid} ended")) == [
        ok("leftovers", "7 ended")
    ]
