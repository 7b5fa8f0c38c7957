"""Commands that take rights or room away from a server, as far as this user may.

Each is a prefix of a command line that ends by becoming that command.
"""

from __future__ import annotations

import os
import shutil
import subprocess

NOBODY = 65534
SHM_MIB = 64


def unprivileged() -> list[str]:
    """Another user without an account's rights, or nothing where this one is not root.

    The capability to read stands for a checkout and an interpreter that everyone may read: here
    they may lie in root's home. It allows no write and no signal.
    """
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", *user, *read, "--"]


def small_shared_memory() -> list[str]:
    """A mount namespace with a small /dev/shm, as containers have; nothing where the kernel or the
    surrounding container allows no such namespace."""
    script = f'mount -t tmpfs -o size={SHM_MIB}m,mode=1777 tmpfs /dev/shm && exec "$@"'
    inner = ["sh", "-c", script, "sh"]
    for options in (["--mount"], ["--mount", "--map-root-user"]):
        prefix = ["unshare", *options, "--", *inner]
        if shutil.which("unshare") is None:
            break
        tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return prefix
    return []
