"""How many files this server may have open, and what that leaves for clients."""

from __future__ import annotations

import contextlib
import resource

from tinfer.errors import StartError

# The master's own without a client: 30 with two workers (November 2026), of which each worker adds
# its socket and its pidfd; the rest is room for restarts, refused clients and files that are read.
RESERVED_DESCRIPTORS = 64
RESERVED_PER_WORKER = 8
MIN_CLIENTS = 16
# What vLLM raises its own soft limit to (`set_ulimit` in vllm/utils/system_utils.py, 0.32). Not the
# hard limit, which may be a billion: there are programs that visit every number below theirs.
WORKER_DESCRIPTORS = 65535


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of open files to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a kernel that allows less than it promised
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def client_descriptors(num_workers: int) -> int:
    """The first descriptor number that a client's connection may not get. The kernel always gives
    the lowest free one, so this many are in use when it is reached, and the rest stays for others.
    Raises `StartError` if that is too few to serve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserved = RESERVED_DESCRIPTORS + RESERVED_PER_WORKER * num_workers
    if limit - reserved < MIN_CLIENTS:
        raise StartError(
            f"the limit of {limit} open files is too low, {reserved + MIN_CLIENTS} are needed: "
            "raise the hard limit (ulimit -Hn, LimitNOFILE=, docker --ulimit nofile)"
        )
    return limit - reserved


def limit_workers(pid: int) -> None:
    """Give a process just started, and so all workers it will fork, the workers' soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(soft, WORKER_DESCRIPTORS), hard))
