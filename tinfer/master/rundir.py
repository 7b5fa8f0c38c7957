"""The private directory that holds this server's sockets and the workers' logs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tinfer.errors import StartError

# A Unix socket's path must fit sockaddr_un: 108 bytes with the final zero on Linux.
MAX_SOCKET_PATH_BYTES = 100


class RunDirectory:
    """A fresh directory, mode 0700, with an unguessable name.

    The zygote removes it at the end, so that it goes even if the master is killed; the master
    removes it where no zygote could.
    """

    def __init__(self) -> None:
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        if not os.access(base, os.W_OK):
            base = tempfile.gettempdir()
        try:
            self.path = Path(tempfile.mkdtemp(prefix="tinfer-", dir=base))
        except OSError as error:
            raise StartError(f"cannot make a run directory in {base}: {error}") from error
        self.socket_path = str(self.path / "workers.sock")
        if len(self.socket_path.encode()) > MAX_SOCKET_PATH_BYTES:
            self.path.rmdir()
            raise StartError(f"socket path is too long, set XDG_RUNTIME_DIR: {self.socket_path}")

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)

    def log_path(self, worker_id: str, log_dir: str | None) -> str:
        """Where a worker writes; `log_dir` outlives the server, the run directory does not."""
        return str((Path(log_dir) if log_dir else self.path) / f"worker-{worker_id}.log")
