"""Worker processes of tinfer whose master is gone, read from /proc.

Every import process and worker holds the read end of its lifeline, a pipe whose write end only the
master has. A process whose lifeline nobody can write to has lost its master: that is exact, needs
no file, and cannot be confused by a reused process id. Such processes end by themselves within a
second; one that does not is stopped or stuck.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

_O_ACCMODE = 3


class Orphan(Struct, frozen=True):
    """A process without a master. `start_ticks` tells it from a later one with the same id;
    `run_dir` is the run directory it was started for, None where it does not say."""

    pid: int
    start_ticks: int
    what: str
    run_dir: str | None


class _Process(Struct, frozen=True):
    pid: int
    parent: int
    start_ticks: int
    words: tuple[str, ...]


def find_orphans(proc: Path = Path("/proc")) -> list[Orphan]:
    """Import processes and workers of this user without a master, and all that they started.

    Empty where a process of this user cannot be looked into, since that one might be the master.
    """
    processes = {process.pid: process for process in _own_processes(proc)}
    lifelines = {p.pid: link for p in processes.values() if (link := _lifeline(proc, p))}
    held = _written_pipes(proc, processes) if lifelines else None
    if held is None:
        return []
    roots = {pid for pid, link in lifelines.items() if link not in held}
    found = []
    for process in processes.values():
        root = _first_in(_ancestry(process, processes), roots)
        if root is None or (process.pid not in roots and process.pid in lifelines):
            continue
        what = _what(process, lifelines) if process.pid in roots else "process of a worker"
        run_dir = _run_dir(processes[root])
        found.append(Orphan(process.pid, process.start_ticks, what, run_dir))
    return found


def _own_processes(proc: Path) -> Iterator[_Process]:
    """This user's processes that still run."""
    for pid in _pids(proc):
        folder = proc / str(pid)
        try:
            if folder.stat().st_uid != os.geteuid():
                continue
            # The name in parentheses may hold anything; state and parent follow the last one.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # gone meanwhile
            continue
        if fields[0] not in "ZX":
            yield _Process(pid, int(fields[1]), int(fields[19]), tuple(words))


def _pids(proc: Path) -> set[int]:
    return {int(path.name) for path in proc.iterdir() if path.name.isdigit()}


def _lifeline(proc: Path, process: _Process) -> str:
    """Its lifeline as "pipe:[inode]"; empty for processes that are no import process or worker."""
    words = process.words
    if ("-m", "tinfer.worker") not in zip(words, words[1:], strict=False):
        return ""
    try:
        return os.readlink(proc / str(process.pid) / "fd" / _option(words, "--lifeline"))
    except OSError:  # gone meanwhile, or closed: without proof it is nobody's orphan
        return ""


def _written_pipes(proc: Path, processes: dict[int, _Process]) -> set[str] | None:
    """Every pipe that some process of this user can write to; None where one cannot be seen."""
    found: set[str] = set()
    for pid in processes:
        try:
            names = os.listdir(proc / str(pid) / "fd")
        except (FileNotFoundError, ProcessLookupError):  # gone meanwhile
            continue
        except OSError:
            return None
        found.update(link for name in names if (link := _written_pipe(proc / str(pid), name)))
    return found


def _written_pipe(folder: Path, name: str) -> str:
    """The pipe behind a descriptor that may be written; empty for any other, or a closed one."""
    try:
        link = os.readlink(folder / "fd" / name)
        return link if link.startswith("pipe:") and _may_write(folder / "fdinfo" / name) else ""
    except OSError:  # closed meanwhile
        return ""


def _may_write(fdinfo: Path) -> bool:
    for line in fdinfo.read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & _O_ACCMODE != os.O_RDONLY
    return True


def _ancestry(process: _Process, processes: dict[int, _Process]) -> Iterator[int]:
    """The process and its ancestors, nearest first."""
    seen: set[int] = set()
    while process.pid not in seen:
        yield process.pid
        seen.add(process.pid)
        process = processes.get(process.parent, process)


def _first_in(pids: Iterator[int], wanted: set[int]) -> int | None:
    return next((pid for pid in pids if pid in wanted), None)


def _what(process: _Process, lifelines: dict[int, str]) -> str:
    """A forked worker has the command line of the import process, its parent."""
    is_worker = "--spec" in process.words or process.parent in lifelines
    return "worker" if is_worker else "import process or worker"


def _run_dir(process: _Process) -> str | None:
    if folder := _option(process.words, "--run-dir"):
        return folder
    try:
        spec = msgspec.json.decode(_option(process.words, "--spec") or "{}")
    except msgspec.DecodeError:
        return None
    path = spec.get("socket_path") if isinstance(spec, dict) else None
    return str(Path(path).parent) if isinstance(path, str) else None


def _option(words: tuple[str, ...], name: str) -> str:
    place = words.index(name) + 1 if name in words else len(words)
    return words[place] if place < len(words) else ""
