"""A server's Unix socket as a file: taken without harm to anybody, and removed by its owner only.

The file of a server that was killed stays, and refuses connections; that, and nothing else, is what
may be removed here.
"""

from __future__ import annotations

import errno
import os
import socket
import stat

# sockaddr_un has 108 bytes for the path and the zero that ends it.
MAX_PATH_BYTES = 107
_CONNECT_S = 2.0


class UnusablePath(Exception):
    """No server can listen there; the message says why."""


def bind_socket(listener: socket.socket, path: str) -> None:
    """Bind a Unix stream socket to `path`, for this user alone from the first moment on.

    Raises `UnusablePath` for a file that is no dead server's socket of this user, `OSError`.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise UnusablePath(f"its path is longer than {MAX_PATH_BYTES} bytes")
    # Linux gives the file the mode of the socket, less the umask.
    os.fchmod(listener.fileno(), 0o600)
    try:
        listener.bind(path)
    except OSError as error:
        # Also for a symbolic link, which is not followed.
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_dead(path)
        listener.bind(path)


def remove_dead(path: str) -> None:
    """Remove what a killed server has left there; leaves everything else alone."""
    try:
        _remove_dead(path)
    except (UnusablePath, OSError):
        return


def remove_own(path: str, inode: tuple[int, int]) -> None:
    """Remove the file if it still is the one with these device and inode numbers."""
    try:
        if inode_of(path) == inode:
            os.unlink(path)
    except FileNotFoundError:
        return


def inode_of(path: str) -> tuple[int, int]:
    """Which file it is, a link not followed."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _remove_dead(path: str) -> None:
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise UnusablePath("it is a symbolic link")
    if not stat.S_ISSOCK(found.st_mode):
        raise UnusablePath("there is a file that is no socket")
    if found.st_uid != os.geteuid():
        raise UnusablePath("the socket there is another user's")
    if _answers(path):
        raise UnusablePath("a server listens there")
    remove_own(path, (found.st_dev, found.st_ino))


def _answers(path: str) -> bool:
    """Whether anything but a refusal comes from there: in doubt somebody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
