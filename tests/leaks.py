"""What a test may not leave behind: processes, open descriptors, shared memory, temporary files.

The check runs around every test. What is closed asynchronously gets GRACE_S to go. Fixtures of a
wider scope are set up before the check looks for the first time, so a server that lives as long
as its module trips nothing by existing; what it starts or opens later, it has to own
(`leak_baseline`).
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

GRACE_S = 5.0
POLL_S = 0.01
# Every process that a test starts inherits it, so one that lost its parent is still recognised.
MARK = f"TINFER_TEST_SESSION={uuid.uuid4().hex}"
SHM = Path("/dev/shm")
# What torch keeps in the temporary directory on purpose.
CACHES = ("torchinductor_",)


@dataclass(frozen=True)
class Snapshot:
    """What exists at one moment: pid to command line, fd to target, and paths."""

    processes: dict[int, str]
    descriptors: dict[int, str]
    paths: frozenset[str]

    def since(self, before: Snapshot) -> list[str]:
        """Describe each thing that is here and was not in `before`."""
        found = [
            f"process {p}: {c}" for p, c in self.processes.items() if p not in before.processes
        ]
        found += [
            f"descriptor {fd}: {target}"
            for fd, target in self.descriptors.items()
            if before.descriptors.get(fd) != target
        ]
        return found + [f"path {path}" for path in sorted(self.paths - before.paths)]


class LeakBaseline:
    """What a test is measured against; fixtures that outlive a test register here what they own."""

    def __init__(self, folder: Path, grace_s: float = GRACE_S) -> None:
        self._folder = folder
        self._grace_s = grace_s
        self._owned_pids: set[int] = set()
        self._owned_paths: set[str] = set()
        # Pids looked at once and found to be none of ours; only new ones cost a look.
        self._foreign: set[int] = set()
        self._before = Snapshot({}, {}, frozenset())

    def own_process(self, pid: int) -> None:
        """Ignore this process and all its descendants from now on."""
        self._owned_pids.add(pid)

    def own_path(self, path: Path) -> None:
        """Ignore this entry of /dev/shm or of the temporary directory from now on."""
        self._owned_paths.add(str(path))

    def rebase(self) -> None:
        """Take what exists now as what may exist after the test."""
        self._before = self._look()

    def leaks(self) -> list[str]:
        """Return what is left over, after waiting up to `grace_s` for it to go."""
        found = self._look().since(self._before)
        deadline_s = time.monotonic() + self._grace_s
        if found:
            gc.collect()
        while found and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            found = self._look().since(self._before)
        # Shared memory carries no name of its maker: what a stranger holds open is the stranger's.
        return [
            leak for leak in found if not leak.startswith(f"path {SHM}") or self._ours(leak[5:])
        ]

    def _look(self) -> Snapshot:
        files = (p for p in self._folder.iterdir() if not p.name.startswith(CACHES))
        paths = {str(path) for path in (*SHM.iterdir(), *files)}
        return Snapshot(
            self._processes(), _descriptors(), frozenset(paths) - frozenset(self._owned_paths)
        )

    def _processes(self) -> dict[int, str]:
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._foreign &= pids
        parents = {pid: _parent(pid) for pid in sorted(pids - self._foreign - {os.getpid()})}
        self._foreign.update(pid for pid in parents if not self._belongs(pid, parents))
        mine = parents.keys() - self._foreign
        return {
            pid: _command(pid)
            for pid in mine
            if not self._owned_pids.intersection(_ancestry(pid, parents))
        }

    def _belongs(self, pid: int, parents: dict[int, int]) -> bool:
        if os.getpid() in _ancestry(pid, parents):
            return True
        try:
            return MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # gone meanwhile, or another user's
            return False

    def _ours(self, path: str) -> bool:
        for pid in self._foreign:
            try:
                if path in Path(f"/proc/{pid}/maps").read_text():
                    return False
                links = Path(f"/proc/{pid}/fd").iterdir()
                if any(os.readlink(link) == path for link in links):
                    return False
            except OSError:  # gone meanwhile, or another user's
                continue
        return True


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of the listing itself
            continue
    return found


def _parent(pid: int) -> int:
    try:
        # The command in parentheses may hold anything; state and parent follow the last one.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        words = ""
    return words[:200] or "(not waited for)"


def _ancestry(pid: int, parents: dict[int, int]) -> list[int]:
    """Return the pid and its ancestors as far as `parents` knows them."""
    line = [pid]
    while line[-1] in parents:
        line.append(parents[line[-1]])
    return line


@pytest.fixture(scope="session")
def leak_baseline() -> Iterator[LeakBaseline]:
    """The registry; also gives this session its own temporary and runtime directory."""
    # Short: Unix sockets below it have 108 bytes for their whole path.
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    with pytest.MonkeyPatch.context() as patch:
        # pytest's own tmp_path stays where people look for it.
        patch.setenv("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        patch.setenv(*MARK.split("="))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield LeakBaseline(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_leaks(leak_baseline: LeakBaseline) -> Iterator[None]:
    """Fail the test that leaves something behind, and name it."""
    leak_baseline.rebase()
    yield
    leaks = leak_baseline.leaks()
    if leaks:
        pytest.fail("left behind:\n  " + "\n  ".join(leaks), pytrace=False)
