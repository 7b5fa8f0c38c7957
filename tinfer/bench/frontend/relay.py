"""The least that a master could do: ZeroMQ batches in, server-sent events out, and nothing else.

No validation, no scheduling, no accounting, no way to cancel, HTTP read by hand: what a token costs
here is what loop, sockets and system calls cost, in Python on uvloop as tinfer's master is. An
event has the bytes that tinfer's has.

    python -m tinfer.bench.frontend.relay --step-s 0 --seq-s 0.0002 --port 8000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop
import zmq
from msgspec import Struct

from tinfer.bench.frontend.emitter import Begin, Token

NUM_EMITTERS = 2
_BATCH = 64
_START_S = 60.0
_ENCODER = msgspec.msgpack.Encoder()
_TOKENS = msgspec.msgpack.Decoder(list[Token])
_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


class _Ask(Struct):
    model: str
    prompt: list[int]
    max_tokens: int


class _Shown(Struct, kw_only=True):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: str | None
    stop_reason: None = None
    prompt_token_ids: None = None
    token_ids: None = None


_ASK = msgspec.json.Decoder(_Ask)
_SHOWN = msgspec.json.Encoder()


class _Connection(asyncio.Protocol):
    """One client; its requests come one after the other."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._read = b""
        self.transport: asyncio.Transport | None = None
        self.start = b""
        self.num_prompt = self.num_tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, end, body = self._read.partition(b"\r\n\r\n")
        if not end:
            return
        _, is_there, length = head.lower().partition(b"content-length:")
        if len(body) < (int(length.split(b"\r\n", 1)[0]) if is_there else 0):
            return
        self._read = b""
        assert self.transport is not None
        if head.startswith(b"GET"):
            models = b'{"object":"list","data":[{"id":"compared","object":"model"}]}'
            self.transport.write(_JSON % (len(models), models))
        else:
            self._begin(body)

    def _begin(self, body: bytes) -> None:
        ask = _ASK.decode(body)
        stream = self._relay.begin(self, ask.max_tokens)
        shared = {
            "id": f"cmpl-{stream:032x}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": ask.model,
        }
        self.start = b"data: " + msgspec.json.encode(shared)[:-1] + b',"choices":['
        self.num_prompt, self.num_tokens = len(ask.prompt), 0

    def token(self, text: str, is_last: bool) -> None:
        """Write one event; with the last one, what ends the stream."""
        if self.transport is None:
            return
        self.num_tokens += 1
        shown = _Shown(text=text, finish_reason="length" if is_last else None)
        event = b"%b%b]}\n\n" % (self.start, _SHOWN.encode(shown))
        if is_last:
            counts = (self.num_prompt, self.num_tokens, self.num_prompt + self.num_tokens)
            usage = b'"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d' % counts
            event += b'%b],"usage":{%b}}\n\ndata: [DONE]\n\n' % (self.start, usage)
        head = _HEAD if self.num_tokens == 1 else b""
        end = b"0\r\n\r\n" if is_last else b""
        self.transport.write(b"%b%x\r\n%b\r\n%b" % (head, len(event), event, end))


class Relay:
    """Hands each stream to an emitter in turn, and each token to its connection."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._streams: dict[int, _Connection] = {}
        self._num_silent = NUM_EMITTERS
        self.ready = asyncio.Event()
        self._sockets = []
        for place in range(NUM_EMITTERS):
            socket = context.socket(zmq.PAIR)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://{folder / str(place)}")
            self._sockets.append(socket)
            self._loop.add_reader(int(socket.getsockopt(zmq.FD)), self._drain, socket)

    def begin(self, connection: _Connection, num_tokens: int) -> int:
        """Have an emitter begin; returns the stream's number."""
        stream = next(self._numbers)
        self._streams[stream] = connection
        socket = self._sockets[stream % NUM_EMITTERS]
        socket.send(_ENCODER.encode(Begin(stream, num_tokens)), zmq.NOBLOCK)
        self._look_again(socket)
        return stream

    def _look_again(self, socket: zmq.Socket[bytes]) -> None:
        """libzmq's descriptor is edge-triggered: any call may have used up the edge."""
        if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._drain, socket)

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_BATCH):
                tokens = _TOKENS.decode(socket.recv(zmq.NOBLOCK))
                if not tokens:
                    self._greeted()
                for token in tokens:
                    self._streams[token.stream].token(token.text, token.is_last)
                    if token.is_last:
                        del self._streams[token.stream]
        self._look_again(socket)

    def _greeted(self) -> None:
        """An emitter is there, and says so before anything else."""
        self._num_silent -= 1
        if not self._num_silent:
            self.ready.set()

    def close(self) -> None:
        """Hand in the sockets."""
        for socket in self._sockets:
            self._loop.remove_reader(int(socket.getsockopt(zmq.FD)))
            socket.close(0)


async def serve(port: int, folder: Path) -> None:
    """Relay until SIGTERM."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    with zmq.Context(1) as context:
        relay = Relay(context, folder)
        try:
            await asyncio.wait_for(relay.ready.wait(), _START_S)
            server = await loop.create_server(lambda: _Connection(relay), "127.0.0.1", port)
            await stopped.wait()
            server.close()
        finally:
            relay.close()


def main(arguments: Any = None) -> None:
    """Start the emitters, relay, and end them."""
    parser = argparse.ArgumentParser(description="a bare relay from ZeroMQ to SSE")
    parser.add_argument("--step-s", default="0")
    parser.add_argument("--seq-s", default="0")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tinfer-relay-") as name:
        command = [sys.executable, "-m", "tinfer.bench.frontend.emitter"]
        emitters = [
            subprocess.Popen(
                [*command, str(Path(name) / str(place)), given.step_s, given.seq_s],
                stdin=subprocess.PIPE,
            )
            for place in range(NUM_EMITTERS)
        ]
        try:
            uvloop.run(serve(given.port, Path(name)))
        finally:
            for emitter in emitters:
                assert emitter.stdin is not None
                emitter.stdin.close()
                emitter.wait()


if __name__ == "__main__":
    main()
