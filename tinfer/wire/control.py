"""What the supervisor and the zygote say to each other over their private socket pair.

Frames are a 4-byte little-endian length and a msgpack body. The zygote forks workers on demand and
reports how each one ended; it never opens a network socket and never imports the master.
"""

from __future__ import annotations

import logging
import socket
import struct
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from tinfer.wire.messages import checked, shown

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 20


class WorkerSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """All that one incarnation of a worker needs to know before it has a socket.

    `environment` is set in the child before any device is touched; `cpus` are the cores that it is
    bound to (empty: not bound), shared out evenly to its `tensor_parallel_size` ranks, each of
    which computes with `num_threads` OpenMP threads on a CPU. `engine_args` are vLLM engine
    arguments by vLLM's names, as JSON has them. `prefill_order`: which of its unfinished prompts a
    step computes first, the first to arrive or the one with the fewest tokens left.
    """

    worker_id: str
    generation: int
    engine: Literal["vllm", "fake"]
    model_dir: str
    socket_path: str
    log_path: str
    kv_transport: str
    device: Literal["cpu", "cuda"]
    cpus: list[int]
    environment: dict[str, str]
    engine_args: dict[str, Any]
    lease_ttl_s: float
    fake: dict[str, int | float] = {}
    tensor_parallel_size: int = 1
    num_threads: int = 1
    prefill_order: Literal["fcfs", "srpt"] = "fcfs"


class Fork(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Start a worker."""

    spec: WorkerSpec


class Forked(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The worker's process exists; `forked` is false where it had to be spawned afresh."""

    worker_id: str
    generation: int
    pid: int
    forked: bool
    note: str = ""


class CannotFork(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The worker was not started, and with this specification never will be."""

    worker_id: str
    generation: int
    reason: str


class Exited(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The worker's process has ended and is reaped; `status` is an exit code, or minus a signal."""

    pid: int
    status: int


class Imported(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The zygote has done its imports and takes orders; `seconds` is what they took."""

    seconds: float


Control = Fork | Forked | CannotFork | Exited | Imported

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)


def pack(message: Control) -> bytes:
    """One frame, ready to be written."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages, however the bytes arrive; holds one frame at most."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Control]:
        """Messages completed by `data`; a frame that is no `Control` is logged and dropped.

        Raises `ValueError` for a frame over the limit: where the next one begins is not known, so
        the stream is of no use any more, and is to be closed.
        """
        self._buffer += data
        messages: list[Control] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                self._buffer.clear()
                raise ValueError(f"control frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                messages.append(checked(_DECODER, body))
            except msgspec.DecodeError as error:
                log.warning("control frame dropped: %s", shown(error))
        return messages


def send(sock: socket.socket, message: Control) -> None:
    """Write one whole frame to a blocking socket."""
    sock.sendall(pack(message))


def unfinished(run_dir: Path) -> Path:
    """What the master calls the run directory while it makes it, and the zygote removes as well."""
    return run_dir.with_name(f".{run_dir.name}")
