"""An engine stand-in for the bare relay: `python -m tinfer.bench.frontend.emitter SOCKET ...`.

It keeps tinfer's fake engine's pace and shape: steps of `step_s` and `seq_s` per stream, each one
message with a token of every stream; the next step is due when the last one was, plus its length.
It ends when its standard input does.
"""

from __future__ import annotations

import sys
import time

import msgspec
import zmq
from msgspec import Struct

MAX_SLEEP_MS = 1000


class Begin(Struct, array_like=True, frozen=True):
    """From the relay: so many tokens of that stream."""

    stream: int
    num_tokens: int


class Token(Struct, array_like=True, frozen=True):
    """To the relay, in a list of those of one step."""

    stream: int
    text: str
    is_last: bool


_ENCODER = msgspec.msgpack.Encoder()
_BEGIN = msgspec.msgpack.Decoder(Begin)


class Emitter:
    """Emits tokens of all begun streams over one PAIR socket."""

    def __init__(self, socket: zmq.Socket[bytes], step_s: float, seq_s: float) -> None:
        self._socket = socket
        self._step_s = step_s
        self._seq_s = seq_s
        self._left: dict[int, int] = {}
        self._due_s = 0.0
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(0, zmq.POLLIN)

    def run(self) -> None:
        """Returns at the end of standard input. Says first that it is there."""
        self._socket.send(_ENCODER.encode([]))
        while True:
            ready = dict(self._poller.poll(self._wait_ms()))
            if 0 in ready:
                return
            if self._socket in ready:
                self._begin()
            if self._left:
                self._sleep()
                self._step()

    def _wait_ms(self) -> int:
        return 0 if self._left else MAX_SLEEP_MS

    def _begin(self) -> None:
        was_idle = not self._left
        try:
            while True:
                begin = _BEGIN.decode(self._socket.recv(zmq.NOBLOCK))
                self._left[begin.stream] = begin.num_tokens
        except zmq.Again:
            pass
        if was_idle:
            self._due_s = time.monotonic() + self._length_s()

    def _sleep(self) -> None:
        wait_s = self._due_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)

    def _step(self) -> None:
        tokens = []
        for stream, left in self._left.items():
            tokens.append(Token(stream, f" {left % 1000}", left == 1))
        self._left = {stream: left - 1 for stream, left in self._left.items() if left > 1}
        self._socket.send(_ENCODER.encode(tokens))
        # One step may be made up for, not a whole pause.
        length_s = self._length_s()
        self._due_s = max(self._due_s, time.monotonic() - length_s) + length_s

    def _length_s(self) -> float:
        return self._step_s + self._seq_s * len(self._left)


def main(path: str, step_s: str, seq_s: str) -> None:
    """Connect to the relay and emit until it closes standard input."""
    with zmq.Context(1) as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{path}")
        Emitter(socket, float(step_s), float(seq_s)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
