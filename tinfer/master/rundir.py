"""The private directory of one running server: its sockets, its temporary files, workers' logs.

It goes with the server, however that ends: the import process, which is there before the directory
is, removes it last, the master where no import process could. What nobody could remove (the machine
went down, every process was killed at once) is told from a live server's by its owner record, on
which the master holds a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from tinfer.errors import StartError
from tinfer.wire.control import unfinished

# A Unix socket's path must fit sockaddr_un: 108 bytes with the final zero on Linux.
MAX_SOCKET_PATH_BYTES = 100
PREFIX = "tinfer-"
OWNER_FILE = "owner.json"
_SOCKET_NAME = "workers.sock"
TEMP_NAME = "tmp"
# What vLLM calls the sockets between the ranks of an engine, in its temporary directory.
_LONGEST_TEMP_NAME = "12345678-1234-1234-1234-123456789abc"
_RANDOM_BYTES, _RANDOM_CHARACTERS = 6, 8


class Owner(Struct, frozen=True):
    """Which process a run directory belongs to: pids are used again, so its start time (clock ticks
    since the boot) and the boot tell it from a later one of that pid. `port` is the server's."""

    pid: int
    start_ticks: int
    boot_id: str
    port: int

    @classmethod
    def this_process(cls, port: int) -> Owner:
        pid = os.getpid()
        return cls(pid, start_ticks(pid) or 0, _boot_id(), port)

    def lives(self) -> bool:
        """Whether that very process runs here."""
        return self.boot_id == _boot_id() and start_ticks(self.pid) == self.start_ticks


class RunDirectory:
    """A directory of mode 0700 with an unguessable name, which is there from `make` on.

    `temp_path` in it is the workers' directory for temporary files, so that what they leave there
    when they are killed goes too. Raises `StartError` if no place for it can be found.
    """

    def __init__(self, port: int = 0) -> None:
        self.path = _base() / f"{PREFIX}{secrets.token_urlsafe(_RANDOM_BYTES)}"
        self.socket_path = str(self.path / _SOCKET_NAME)
        self.temp_path = str(self.path / TEMP_NAME)
        self._port = port
        self._lock_fd = -1

    def make(self) -> None:
        """Create it. Raises `StartError`."""
        try:
            self._lock_fd = _create(self.path, Owner.this_process(self._port))
        except OSError as error:
            base = self.path.parent
            raise StartError(f"cannot make a run directory in {base}: {error}") from error

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def log_path(self, worker_id: str, log_dir: str | None) -> str:
        """Where a worker writes; `log_dir` outlives the server, the run directory does not."""
        return str((Path(log_dir) if log_dir else self.path) / f"worker-{worker_id}.log")


class FoundDirectory(Struct, frozen=True):
    """A run directory on this box. `alive` is false only where its server has certainly ended."""

    path: Path
    pid: int
    port: int
    alive: bool


def run_directories() -> list[FoundDirectory]:
    """This user's run directories, in every place where a server with this environment makes one.

    A directory without an owner record is none of tinfer's and is left out.
    """
    found = []
    for path in sorted({path for base in _bases() for path in _candidates(base)}):
        with contextlib.suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
            with (path / OWNER_FILE).open("rb") as file:
                owner = msgspec.json.decode(file.read(), type=Owner)
                alive = _is_locked(file.fileno()) or owner.lives()
            found.append(FoundDirectory(path, owner.pid, owner.port, alive))
    return found


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None if it does not run (any more)."""
    try:
        # The command in parentheses may hold anything; the fields are counted from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _base() -> Path:
    """The first place that is ours to write to and leaves room for the sockets' paths."""
    bases = list(_bases())
    for base in bases:
        if _longest_socket_path_bytes(base) <= MAX_SOCKET_PATH_BYTES:
            return base
    raise StartError(
        f"no place for sockets: their paths would exceed {MAX_SOCKET_PATH_BYTES} bytes below "
        f"{', '.join(map(str, bases)) or 'any writable directory'}; set XDG_RUNTIME_DIR or TMPDIR"
    )


def _bases() -> Iterator[Path]:
    """The user's runtime directory, the temporary one, and the system's where that one is odd.

    A runtime directory of another user (kept in the environment by `su` and `sudo`) is not ours:
    it goes when that user logs out.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime) and _owner_uid(runtime) == os.geteuid():
        if os.access(runtime, os.W_OK | os.X_OK):
            yield Path(runtime)
    with contextlib.suppress(FileNotFoundError):  # there is no temporary directory at all
        yield Path(tempfile.gettempdir())
    if os.access("/tmp", os.W_OK | os.X_OK):
        yield Path("/tmp")


def _longest_socket_path_bytes(base: Path) -> int:
    run = base / (PREFIX + "x" * _RANDOM_CHARACTERS)
    paths = (run / _SOCKET_NAME, run / TEMP_NAME / _LONGEST_TEMP_NAME)
    return max(len(os.fsencode(path)) for path in paths)


def _candidates(base: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for path in base.iterdir():
            mine = path.name.startswith(PREFIX) and not path.is_symlink()
            if mine and _owner_uid(str(path)) == os.geteuid():
                yield path


def _owner_uid(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except OSError:
        return None


def _create(path: Path, owner: Owner) -> int:
    """Make the directory; returns the descriptor that holds the lock on its owner record. The lock
    goes with this process: the import process does not inherit the descriptor."""
    # It gets its final name once the record is locked, so nobody ever sees it without one.
    fresh = unfinished(path)
    fresh.mkdir(mode=0o700)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(fresh / OWNER_FILE, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, msgspec.json.encode(owner))
            (fresh / TEMP_NAME).mkdir(mode=0o700)
            fresh.rename(path)
            return fd
        except OSError:
            os.close(fd)
            raise
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
