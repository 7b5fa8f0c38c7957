"""`tinfer restart`: see `tinfer.cli.drain`."""

from __future__ import annotations

from tinfer.cli.drain import made

command = made(
    "restart",
    "Start WORKER of a running server anew, once it has finished what it has; one that is down is "
    "started at once. No stream is lost by it.",
)
