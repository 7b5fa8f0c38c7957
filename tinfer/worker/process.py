"""The life of one worker process, from the fork to its exit code.

Order matters: the environment and the core binding come before any device is touched, the engine is
built before any thread or socket exists (a tensor-parallel engine forks), and the lifeline is
watched from then on, so that no worker outlives its master.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn

import zmq

from tinfer.wire.control import WorkerSpec
from tinfer.wire.messages import (
    MAX_MESSAGE_BYTES,
    CannotStart,
    Fault,
    Ready,
    ToMaster,
    encode,
)
from tinfer.worker.adapter import Engine
from tinfer.worker.loop import WorkerLoop

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_ENGINE_BROKE = 70
EXIT_CANNOT_START = 78
EXIT_ORPHANED = 79
# Bounds what a stopping worker may still spend on handing its last messages to the master.
LINGER_MS = 500


def run_worker(spec: WorkerSpec, lifeline: int) -> NoReturn:
    """Be this worker until it ends; never returns, never runs the parent's exit handlers."""
    code = EXIT_ENGINE_BROKE
    try:
        code = _run(spec, lifeline)
    except BaseException:  # noqa: BLE001  the exit code is all that is left to tell
        log.exception("worker %s ended by an error", spec.worker_id)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(spec: WorkerSpec, lifeline: int) -> int:
    started = time.monotonic()
    _detach(spec)
    engine: Engine | None = None
    first: ToMaster
    try:
        engine = _build(spec)
        first = engine.ready()
    except Exception as error:
        log.exception("worker %s cannot start", spec.worker_id)
        first = CannotStart(_one_line(error))
    _exit_with_master(lifeline)
    built_s = time.monotonic() - started
    context = zmq.Context(1)
    socket = context.socket(zmq.DEALER)
    try:
        _connect(socket, spec)
        if engine is None or not isinstance(first, Ready):
            socket.send(encode(first))
            return EXIT_CANNOT_START
        first.start_s["engine"] = built_s
        socket.send(encode(first))
        return _serve(engine, socket)
    finally:
        socket.close(LINGER_MS)
        context.term()


def _serve(engine: Engine, socket: zmq.Socket[bytes]) -> int:
    try:
        WorkerLoop(engine, socket).run()
    except Exception as error:
        log.exception("the engine broke")
        socket.send(encode(Fault(_one_line(error))))
        return EXIT_ENGINE_BROKE
    engine.close()
    return EXIT_OK


def _connect(socket: zmq.Socket[bytes], spec: WorkerSpec) -> None:
    """The identity carries the generation: what an older incarnation sent is dropped by it."""
    socket.setsockopt(zmq.IDENTITY, f"{spec.worker_id}.{spec.generation}".encode())
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the requests in flight, which the master bounds
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.connect(f"ipc://{spec.socket_path}")


def _build(spec: WorkerSpec) -> Engine:
    if spec.engine == "fake":
        from tinfer.worker.fake_engine import FakeEngine

        return FakeEngine(spec)
    from tinfer.worker.engine import VllmEngine

    return VllmEngine(spec)


def _detach(spec: WorkerSpec) -> None:
    """Own session, own log, own core, own devices; the terminal's Ctrl-C is the master's matter."""
    with contextlib.suppress(PermissionError):  # already a leader where spawned that way
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.environ.update(spec.environment)
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def _exit_with_master(lifeline: int) -> None:
    """End this process as soon as the master's end of the pipe closes, however it died."""

    def watch() -> None:
        while True:
            try:
                if not os.read(lifeline, 1):
                    os._exit(EXIT_ORPHANED)
            except InterruptedError:
                continue

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
