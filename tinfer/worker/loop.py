"""The worker's only loop: messages in, engine steps, messages out, all in one thread.

A step takes milliseconds, so messages are read between steps and nothing needs a second thread or
an event loop: libzmq moves the bytes in its own. When nothing computes the loop sleeps in poll()
until a message comes or a pull ends; while it only waits for readers of its leases it looks at the
lease table every few milliseconds, and at once when the master says so (`Wake`).
"""

from __future__ import annotations

import contextlib
import logging
from typing import assert_never

import msgspec
import zmq

from tinfer.wire.messages import (
    Abort,
    ExtendLease,
    Idle,
    PeerDown,
    PeerUp,
    Ping,
    Pong,
    Refused,
    ReleaseLease,
    Resume,
    SetBudget,
    Start,
    Step,
    Stop,
    ToMaster,
    ToWorker,
    Wake,
    decode_to_worker,
    encode,
    shown,
)
from tinfer.worker.adapter import Engine, EngineRefusal

log = logging.getLogger(__name__)

# How long an engine that only waits (for readers of its leases, for pulls, for blocks, for a
# grammar) sleeps between looks. Pulls and `Wake` cut it short; an empty step costs about 0.1 ms.
WAITING_POLL_MS = 2


class WorkerLoop:
    """Runs one engine for one master until `Stop` comes or the engine breaks."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._socket = socket
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(engine.wake_fd(), zmq.POLLIN)
        self._stopping = False
        self._was_busy = False

    def run(self) -> None:
        """Returns after `Stop`; what the engine raises passes through."""
        while not self._stopping:
            self._wait()
            self._read_messages()
            self._step()

    def _wait(self) -> None:
        if not self._engine.has_requests():
            timeout_ms: int | None = None
        elif self._engine.was_idle_step():
            timeout_ms = WAITING_POLL_MS
        else:
            timeout_ms = 0
        for ready, _ in self._poller.poll(timeout_ms):
            if ready == self._engine.wake_fd():
                self._engine.clear_wake()

    def _read_messages(self) -> None:
        with contextlib.suppress(zmq.Again):
            while not self._stopping:
                data = self._socket.recv(zmq.NOBLOCK)
                try:
                    message = decode_to_worker(data)
                except msgspec.DecodeError as error:
                    log.warning("message dropped: %s", shown(error))
                    continue
                self._handle(message)

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Start():
                self._start(message)
            case Resume(request_id, source):
                self._engine.resume(request_id, source)
            case Abort(request_ids):
                self._engine.abort(request_ids)
            case SetBudget(prefill_tokens):
                self._engine.set_prefill_budget(prefill_tokens)
            case ReleaseLease(lease):
                self._engine.release_lease(lease)
            case ExtendLease(lease, extra_s):
                self._engine.extend_lease(lease, extra_s)
            case PeerUp(worker_id, generation, export):
                self._engine.add_peer(worker_id, generation, export)
            case PeerDown(worker_id, generation):
                self._engine.drop_peer(worker_id, generation)
            case Wake():
                pass  # the step below looks at the lease table
            case Ping():
                self._send(Pong())
            case Stop():
                self._stopping = True
            case _:
                assert_never(message)

    def _start(self, start: Start) -> None:
        try:
            self._engine.start(start)
        except EngineRefusal as refusal:
            self._send(Refused(start.request_id, str(refusal), refusal.client_fault))

    def _step(self) -> None:
        busy = self._engine.has_requests()
        if busy and not self._stopping:
            outputs = self._engine.step()
            progress, preempted = self._engine.take_report()
            if outputs or progress or preempted:
                self._send(Step(outputs, self._engine.stats(), progress, preempted))
        for notice in self._engine.take_notices():
            self._send(notice)
        busy = busy and self._engine.has_requests()
        if self._was_busy and not busy:
            self._send(Idle(self._engine.stats()))
        self._was_busy = busy

    def _send(self, message: ToMaster) -> None:
        self._socket.send(encode(message))
