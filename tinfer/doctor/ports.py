"""Whether the port that `tinfer serve` takes by default is free, and who has it if not."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

import psutil

from tinfer.config import ServeConfig
from tinfer.doctor.finding import Finding, ok, warning
from tinfer.master.conflicts import port_holder

CHECK = "port"


def check_port(
    port: int, error: OSError | None, pid: int | None, command: Sequence[str]
) -> Finding:
    """`error` is what binding it came to; `pid` and `command` are its holder's, where known."""
    if error is None:
        return ok(CHECK, f"{port} is free")
    advice = "tinfer serve --port N takes another one, --port 0 any free one"
    if error.errno != errno.EADDRINUSE:
        return warning(CHECK, f"{port} cannot be used: {error.strerror}", advice)
    if pid is None:
        return warning(CHECK, f"{port} is held by another user's process", advice)
    words = list(command)
    if "serve" in words and any("tinfer" in word for word in words[: words.index("serve")]):
        return ok(CHECK, f"{port}: a tinfer server listens there (pid {pid})")
    return warning(CHECK, f"{port} is held by pid {pid} ({' '.join(words)[:80]})", advice)


def try_port(host: str, port: int) -> Finding:
    """Try it as the server would."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            pid = port_holder(host, port)
            return check_port(port, error, pid, command_of(pid) if pid is not None else ())
    return check_port(port, None, None, ())


def command_of(pid: int) -> list[str]:
    """Its command line; empty where it has gone or is not to be seen."""
    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.Error:
        return []


def check_default_port() -> Finding:
    """The port and address of `tinfer serve` without options."""
    defaults = ServeConfig()
    return try_port(defaults.host, defaults.port)
