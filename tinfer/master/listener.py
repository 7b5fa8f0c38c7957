"""The listening socket: taken before anything heavy starts, opened to clients once all is ready.

It accepts connections itself instead of leaving that to aiohttp, which knows no limit: with too
many clients, accepting would fail for want of descriptors, and so would everything else that opens
one. Who comes too early or over the limit is told so with a 503.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, cast

import msgspec

from tinfer import unix_socket
from tinfer.api.failures import error_body
from tinfer.errors import NoWorker, StartError
from tinfer.master import conflicts
from tinfer.master.tls import HANDSHAKE_TIMEOUT_S, SHUTDOWN_TIMEOUT_S

log = logging.getLogger(__name__)

# Connections that may wait to be accepted; the kernel cuts it to net.core.somaxconn.
_BACKLOG = 4096
# Connections accepted in one turn of the loop; the others wait for the next.
_BATCH = 64
# Refused clients that may still send their request; the answer reaches nobody whose socket is
# closed before. Beyond that many the connection is just closed.
_MAX_REFUSALS = 16
_REFUSAL_S = 5.0
# After an accept that failed for want of something.
_PAUSE_S = 0.1

Factory = Callable[[], asyncio.Protocol]


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that the address is ours from now on. Clients wait until a
    `Door` looks after it. Raises `StartError` naming what is in the way."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Two may bind the same port, only one can listen on it.
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StartError(conflicts.explain_address(host, port, error)) from error
    return listener


def bind_unix(path: str) -> socket.socket:
    """The same at a path. Raises `StartError`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        unix_socket.bind_socket(listener, path)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except (unix_socket.UnusablePath, OSError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) else error
        raise StartError(f"--uds {path} cannot be used: {why}") from error
    return listener


class Door:
    """Accepts connections from `listener`, which it closes at the end.

    A connection whose descriptor would be `end_descriptor` or higher is refused. With `tls` each is
    wrapped in it; one whose handshake fails or does not end in time is closed.
    """

    def __init__(
        self, listener: socket.socket, end_descriptor: int, tls: ssl.SSLContext | None = None
    ) -> None:
        self._listener = listener
        self._end = end_descriptor
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._factory: Factory | None = None
        self._refusals: set[_Refusal] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._is_full = False
        self._loop.add_reader(listener, self._accept)

    def open(self, factory: Factory) -> None:
        """From now on every connection gets a protocol of this factory."""
        self._factory = factory

    def close(self) -> None:
        """Let nobody in any more. Idempotent; connections that are in live on."""
        if self._listener.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for refusal in list(self._refusals):
            refusal.end()
        for task in self._tasks:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                client, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._rest(error)
                    return
                continue  # this client is gone already
            client.setblocking(False)
            self._admit(client)

    def _admit(self, client: socket.socket) -> None:
        if client.fileno() >= self._end:
            if not self._is_full:
                log.warning("all %d descriptors are in use: refusing new connections", self._end)
            self._is_full = True
            self._refuse(client, "too many open connections")
        elif self._factory is None:
            self._refuse(client, "the server is starting")
        else:
            self._is_full = False
            self._connect(self._factory, client, HANDSHAKE_TIMEOUT_S)

    def _refuse(self, client: socket.socket, why: str) -> None:
        if len(self._refusals) >= _MAX_REFUSALS:
            client.close()
            return
        refusal = _Refusal(why, self._refusals.discard)
        self._refusals.add(refusal)
        self._connect(lambda: refusal, client, _REFUSAL_S)

    def _connect(self, factory: Factory, client: socket.socket, handshake_s: float) -> None:
        wrapped: dict[str, Any] = {}
        if self._tls is not None:
            wrapped = {
                "ssl": self._tls,
                "ssl_handshake_timeout": handshake_s,
                "ssl_shutdown_timeout": SHUTDOWN_TIMEOUT_S,
            }
        task: asyncio.Task[object] = self._loop.create_task(
            self._loop.connect_accepted_socket(factory, client, **wrapped)
        )
        self._tasks.add(task)
        task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._tls is not None and isinstance(error, OSError):
            # Whoever scans a port, or speaks plain HTTP to it, does this: nothing for the log.
            log.debug("no TLS with a client: %s", error)
        else:
            log.error("a connection could not be taken", exc_info=error)

    def _rest(self, error: OSError) -> None:
        """The socket stays readable, so without a pause the loop would spin."""
        log.error("cannot accept connections: %s", error)
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(
            _PAUSE_S, self._loop.add_reader, self._listener, self._accept
        )


class _Refusal(asyncio.Protocol):
    """Answers whatever is sent with a 503, and closes; also if nothing comes for a while."""

    def __init__(self, why: str, on_end: Callable[[_Refusal], None]) -> None:
        body = msgspec.json.encode(error_body(NoWorker(why)))
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
        )
        self._answer = head.encode() + body
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._has_ended = False
        self._timer = asyncio.get_running_loop().call_later(_REFUSAL_S, self.end)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._has_ended:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._answer)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._on_end(self)

    def end(self) -> None:
        """Close without an answer."""
        self._has_ended = True
        self._timer.cancel()
        self._on_end(self)
        if self._transport is not None:
            self._transport.abort()
