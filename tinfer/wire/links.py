"""The master's end of the sockets: one ROUTER, on which every worker is known by its identity.

An identity is `worker_id.generation`, so a message says by itself which incarnation sent it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import zmq

from tinfer.wire.messages import (
    MAX_MESSAGE_BYTES,
    ToMaster,
    ToWorker,
    decode_to_master,
    encode,
    shown,
)

log = logging.getLogger(__name__)

# Messages handled before other tasks of the loop get a turn.
_BATCH = 64


class Incarnation(NamedTuple):
    """One life of one worker."""

    worker_id: str
    generation: int

    @property
    def identity(self) -> bytes:
        return f"{self.worker_id}.{self.generation}".encode()


def incarnation_of(identity: bytes) -> Incarnation:
    """The inverse of `Incarnation.identity`. Raises `ValueError` for anything else."""
    worker_id, _, generation = identity.decode().rpartition(".")
    incarnation = Incarnation(worker_id, int(generation))
    # int() also takes " 1", "+1" and "1_0"
    if not worker_id or incarnation.generation < 0 or incarnation.identity != identity:
        raise ValueError(f"{identity!r} is no incarnation's identity")
    return incarnation


class MasterLink:
    """Talks to all workers on the running asyncio loop, without a task of its own."""

    def __init__(self, path: str, on_message: Callable[[Incarnation, ToMaster], None]) -> None:
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context(1)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        # Bounded by the number of requests in flight, which the scheduler bounds.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # The peer that claims more is disconnected before anything is set aside for it.
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(f"ipc://{path}")
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._closed = False
        self._loop.add_reader(self._fd, self._drain)

    def send(self, to: Incarnation, message: ToWorker) -> None:
        """Hand a message to libzmq; never blocks. For an incarnation that has gone it is dropped:
        the supervisor sees the death itself."""
        if self._closed:
            return
        try:
            self._socket.send_multipart([to.identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.info("message to %s.%d dropped: %s", *to, error)
        self._look_again()

    def _look_again(self) -> None:
        """libzmq's descriptor is edge-triggered: any call may have used up the edge."""
        if not self._closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        if self._closed:
            return
        try:
            with contextlib.suppress(zmq.Again):
                for _ in range(_BATCH):
                    self._receive(self._socket.recv_multipart(zmq.NOBLOCK))
                    if self._closed:
                        return
        finally:  # an error of the receiver must not leave the rest unread until the next edge
            self._look_again()

    def _receive(self, frames: list[bytes]) -> None:
        try:
            identity, data = frames
            sender, message = incarnation_of(identity), decode_to_master(data)
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("message dropped, from %.64a: %s", frames[0], shown(error))
            return
        self._on_message(sender, message)

    def close(self) -> None:
        """Idempotent; unsent messages are dropped."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._socket.close(0)
        self._context.term()
