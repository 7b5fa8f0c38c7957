"""Every decoder that reads what another process wrote, with good frames of its own to break.

A decoder here takes bytes and returns how many messages it found. What it rejects gives none or one
of `rejections`, and anything else is a bug. What it accepts must encode and decode again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from tests.wire.samples import CONTROL, TO_MASTER, TO_WORKER
from tinfer.api.decode import BodyDecoder
from tinfer.api.responses_api.request import ResponsesRequest
from tinfer.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tinfer.errors import InvalidRequest
from tinfer.wire.control import FrameReader, pack
from tinfer.wire.links import incarnation_of
from tinfer.wire.messages import decode_opaque, decode_to_master, decode_to_worker, encode
from tinfer.worker.fake_kv import FakeBlocks, FakeExport
from tinfer.worker.kv.geometry import Geometry, Region
from tinfer.worker.kv.shm import ShmDescriptor
from tinfer.worker.kv.source import SourceBlocks

_DESCRIPTOR = ShmDescriptor(pid=99, fd=7, size_bytes=4096, start_time_ticks=5, inode=6)
_GEOMETRY = Geometry(
    layout="NHD",
    dtype="bfloat16",
    block_tokens=16,
    num_blocks=4,
    total_bytes=4096,
    model_hash="m",
    tp_size=1,
    tp_rank=0,
    regions=(
        Region(
            offset_bytes=0,
            num_layers=2,
            layer_stride_bytes=2048,
            block_stride_bytes=512,
            page_bytes=512,
            group=0,
        ),
    ),
)
_BODIES: dict[type[Struct], Sequence[dict[str, Any]]] = {
    CompletionRequest: (
        {"prompt": "a", "n": 2, "stream": True, "stop": ["x"], "logit_bias": {"1": 0.5}},
        {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 2, "max_tokens": 3, "user": "u"},
        {"prompt": "a", "structured_outputs": {"choice": ["a"]}, "response_format": None},
    ),
    ChatRequest: (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": []},
        {"messages": [{"role": "assistant", "content": None}], "reasoning_effort": "low"},
    ),
    ResponsesRequest: (
        {"input": "a", "tools": [{"type": "function", "name": "f"}], "metadata": {"a": "b"}},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
    ),
    TokenizeRequest: ({"prompt": "a"}, {"messages": [], "tools": [{"function": {"name": "f"}}]}),
    DetokenizeRequest: ({"tokens": [1, 2]},),
}


class Channel(Struct, frozen=True):
    """One decoder: good frames, and how to read one. `read` returns the number of messages."""

    name: str
    frames: Sequence[bytes]
    read: Callable[[bytes], int]
    rejections: tuple[type[Exception], ...]


def _again(decode: Callable[[bytes], Any]) -> Callable[[bytes], int]:
    def read(data: bytes) -> int:
        encoded = encode(decode(data))
        assert encode(decode(encoded)) == encoded  # bytes, since NaN != NaN
        return 1

    return read


def _opaque(kind: type[Struct], *good: Struct) -> Channel:
    frames = [msgspec.msgpack.encode(one) for one in good]
    read = _again(lambda data: decode_opaque(kind, data))
    return Channel(kind.__name__, frames, read, (msgspec.DecodeError,))


def _read_control(data: bytes) -> int:
    """As the body of one frame; the reader goes on with the next one."""
    reader = FrameReader()
    found = reader.feed(struct.pack("<I", len(data)) + data)
    assert reader.feed(pack(CONTROL[-1])) == [CONTROL[-1]]
    return len(found)


def _read_stream(data: bytes) -> int:
    """As a stream that comes in pieces."""
    reader = FrameReader()
    return sum(len(reader.feed(data[at : at + 7])) for at in range(0, len(data), 7))


def _read_identity(data: bytes) -> int:
    assert incarnation_of(data).identity == data
    return 1


def _read_body(kind: type[Struct]) -> Callable[[bytes], int]:
    decoders = [BodyDecoder(kind, strict) for strict in (False, True)]

    def read(data: bytes) -> int:
        parsed, _ = decoders[0].decode(data)
        assert isinstance(parsed, kind)
        decoders[1].decode(data)
        return 1

    return read


def _bodies(kind: type[Struct]) -> Channel:
    frames = [msgspec.json.encode(body) for body in _BODIES[kind]]
    return Channel(kind.__name__, frames, _read_body(kind), (InvalidRequest,))


_REJECTS = (msgspec.DecodeError,)
BINARY = (
    Channel("to_worker", [encode(m) for m in TO_WORKER], _again(decode_to_worker), _REJECTS),
    Channel("to_master", [encode(m) for m in TO_MASTER], _again(decode_to_master), _REJECTS),
    Channel("control", [pack(message)[4:] for message in CONTROL], _read_control, ()),
    _opaque(FakeExport, FakeExport(_DESCRIPTOR, _DESCRIPTOR, 16)),
    _opaque(FakeBlocks, FakeBlocks([1, 2, 3])),
    _opaque(SourceBlocks, SourceBlocks(((1, 2), (3,)))),
    _opaque(Geometry, _GEOMETRY),
    _opaque(ShmDescriptor, _DESCRIPTOR),
)
# Not made of msgpack as a whole: mutations that take a message apart do not fit.
STREAM = Channel("control stream", [pack(one) for one in CONTROL], _read_stream, (ValueError,))
IDENTITIES = Channel("identity", [b"p-0.1", b"decode-12.40"], _read_identity, (ValueError,))
BODIES = tuple(_bodies(kind) for kind in _BODIES)
