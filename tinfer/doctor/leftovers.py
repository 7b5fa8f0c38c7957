"""What servers that ended badly have left: processes, run directories, names in /dev/shm.

Owns the rule that nothing of a live run or of anybody else is touched. A process counts only if its
lifeline has no writer and its run directory is dead or gone; a run directory only if its owner
record says that its server has ended; a name in /dev/shm only if it starts with the name of such a
directory. A server that has just ended takes everything down by itself, so what is found is looked
at again after a while before it is believed.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from tinfer.doctor.finding import Finding, fault, ok, warning
from tinfer.doctor.processes import Orphan, find_orphans
from tinfer.master.rundir import run_directories

CHECK = "leftovers"
SHM = Path("/dev/shm")
# Longer than an import process gives its workers (ORPHAN_GRACE_S in worker/zygote.py) and itself.
GRACE_S = 2.0
END_TIMEOUT_S = 10.0
_FIX = "tinfer doctor --fix removes it"


class Leftovers(Struct, frozen=True):
    """Orphaned processes, run directories of dead servers, files in /dev/shm named after those."""

    orphans: tuple[Orphan, ...] = ()
    run_dirs: tuple[Path, ...] = ()
    shm_files: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.orphans or self.run_dirs)

    def has(self, orphan: Orphan) -> bool:
        """Whether that very process is among the orphans; the rest of what is said of it changes
        when its parent goes."""
        who = (orphan.pid, orphan.start_ticks)
        return any((other.pid, other.start_ticks) == who for other in self.orphans)

    def both(self, later: Leftovers) -> Leftovers:
        """What is in this look and in a later one."""
        return Leftovers(
            tuple(orphan for orphan in self.orphans if later.has(orphan)),
            tuple(path for path in self.run_dirs if path in later.run_dirs),
            tuple(path for path in self.shm_files if path in later.shm_files),
        )


def look(shm: Path = SHM, proc: Path = Path("/proc")) -> Leftovers:
    """One look. A process is left out while its run directory exists and is not found dead."""
    runs = {run.path: run.alive for run in run_directories()}
    dead = tuple(path for path, alive in runs.items() if not alive)
    orphans = tuple(
        orphan
        for orphan in find_orphans(proc)
        if orphan.run_dir is not None
        and (Path(orphan.run_dir) in dead or not Path(orphan.run_dir).exists())
    )
    return Leftovers(orphans, dead, tuple(_named_after(dead, shm)))


def look_twice(
    see: Callable[[], Leftovers] = look, wait: Callable[[float], None] = time.sleep
) -> Leftovers:
    """What is still there after the time that a server takes to clean up."""
    first = see()
    if not first:
        return first
    wait(GRACE_S)
    return first.both(see())


def describe(left: Leftovers) -> list[Finding]:
    """A finding per process and directory."""
    if not left:
        return [ok(CHECK, "none: no process, directory or memory of a dead server")]
    findings = [
        fault(CHECK, f"{orphan.what}, pid {orphan.pid}: runs, but its server has ended", _FIX)
        for orphan in left.orphans
    ]
    for run_dir in left.run_dirs:
        number = len([path for path in left.shm_files if _is_named_after(path, run_dir)])
        words = f"{run_dir}: its server has ended"
        if number:
            words += f"; {number} files in {SHM} are named after it"
        findings.append(warning(CHECK, words, _FIX))
    return findings


def remove(left: Leftovers, end: Callable[[Orphan], Finding] | None = None) -> list[Finding]:
    """End the orphans, then remove the directories and names; a finding per thing."""
    findings = [(end or end_orphan)(orphan) for orphan in left.orphans]
    # Once more: only now are the last processes gone that could use what is in them.
    still_dead = {run.path for run in run_directories() if not run.alive}
    for run_dir in left.run_dirs:
        if run_dir in still_dead:
            _remove_run(run_dir, left.shm_files)
        findings.append(
            fault(CHECK, f"{run_dir}: cannot be removed", f"rm -r {run_dir}")
            if run_dir.exists()
            else ok(CHECK, f"{run_dir}: removed")
        )
    return findings


def end_orphan(
    orphan: Orphan, see: Callable[[], Leftovers] = look, timeout_s: float = END_TIMEOUT_S
) -> Finding:
    """Kill it if it is still the same process and still an orphan, and wait for its end."""
    who = f"{orphan.what}, pid {orphan.pid}"
    try:
        pidfd = os.pidfd_open(orphan.pid)
    except ProcessLookupError:
        return ok(CHECK, f"{who}: has ended")
    try:
        # From here on no other process can get its id unseen.
        if not see().has(orphan):
            return ok(CHECK, f"{who}: is none any more; left alone")
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            return ok(CHECK, f"{who}: ended")
    except ProcessLookupError:
        return ok(CHECK, f"{who}: has ended")
    finally:
        os.close(pidfd)
    return fault(
        CHECK,
        f"{who}: does not end",
        f"it is stuck in the kernel, see /proc/{orphan.pid}/stack; reboot if it holds a GPU",
    )


def _remove_run(run_dir: Path, shm_files: tuple[Path, ...]) -> None:
    """Names first: while the directory stands, they can still be told to be ours."""
    for path in shm_files:
        if _is_named_after(path, run_dir):
            path.unlink(missing_ok=True)
    shutil.rmtree(run_dir, ignore_errors=True)


def _named_after(run_dirs: tuple[Path, ...], shm: Path) -> list[Path]:
    if not shm.is_dir():
        return []
    files = sorted(shm.iterdir())
    return [f for f in files if any(_is_named_after(f, run_dir) for run_dir in run_dirs)]


def _is_named_after(path: Path, run_dir: Path) -> bool:
    """Source: worker/ranks/names.py; multiprocessing puts "sem." before names of semaphores."""
    return path.name.removeprefix("sem.").startswith(f"{run_dir.name}.")
