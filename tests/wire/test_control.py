"""The control stream of supervisor and zygote, however its bytes arrive and whatever they are."""

from __future__ import annotations

import socket
import struct
from contextlib import closing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.samples import CONTROL
from tests.wire.strategies import any_of
from tinfer.wire.control import (
    MAX_FRAME_BYTES,
    Control,
    Exited,
    FrameReader,
    Imported,
    pack,
    send,
)

STREAM = b"".join(map(pack, CONTROL))


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


@given(st.lists(any_of(Control), max_size=3), st.data())
def test_any_cutting_gives_the_same_messages(messages: list[Control], data: st.DataObject) -> None:
    stream = b"".join(map(pack, messages))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=6).map(sorted))
    reader = FrameReader()
    read = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        read += reader.feed(stream[start:end])
    assert read == messages


def test_a_cut_at_every_byte() -> None:
    for cut in range(len(STREAM) + 1):
        reader = FrameReader()
        assert reader.feed(STREAM[:cut]) + reader.feed(STREAM[cut:]) == CONTROL


def test_byte_by_byte() -> None:
    reader = FrameReader()
    assert [m for byte in STREAM for m in reader.feed(bytes([byte]))] == CONTROL


def test_an_over_long_frame_is_refused_by_its_head_alone() -> None:
    for length in (MAX_FRAME_BYTES + 1, 2**32 - 1):
        reader = FrameReader()
        with pytest.raises(ValueError, match=str(length)):
            reader.feed(struct.pack("<I", length))


def test_a_frame_of_the_longest_length_is_waited_for() -> None:
    assert FrameReader().feed(struct.pack("<I", MAX_FRAME_BYTES) + b"\xc1") == []


BROKEN = {
    "empty": b"",
    "not msgpack": b"\xc1",
    "a list": msgspec.msgpack.encode([1]),
    "no tag": msgspec.msgpack.encode({"pid": 1, "status": 0}),
    "a tag of another channel": msgspec.msgpack.encode({"type": "Stop"}),
    "a field too many": msgspec.msgpack.encode({"type": "Imported", "seconds": 1.0, "x": 1}),
    "a field too few": msgspec.msgpack.encode({"type": "Exited", "pid": 1}),
    "a field of another type": msgspec.msgpack.encode({"type": "Imported", "seconds": "1"}),
    "not UTF-8": b"\x81\xa4type\xa1\xff",
    "trailing bytes": msgspec.msgpack.encode(Imported(1.0)) + b"\0",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_frame_is_logged_and_those_around_it_are_read(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = Exited(7, -9), Imported(2.0)
    assert FrameReader().feed(pack(before) + frame(body) + pack(after)) == [before, after]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.exc_info is None
    assert "\n" not in record.getMessage() and len(record.getMessage()) < 300


def test_after_a_frame_over_the_limit_nothing_is_kept() -> None:
    reader = FrameReader()
    for _ in range(3):
        with pytest.raises(ValueError, match="control frame"):
            reader.feed(struct.pack("<I", MAX_FRAME_BYTES + 1) + bytes(1 << 16))
        assert not reader._buffer


@given(st.binary(max_size=64))
def test_random_bytes_are_messages_or_an_error(data: bytes) -> None:
    reader = FrameReader()
    try:
        for message in reader.feed(data):
            assert FrameReader().feed(pack(message)) == [message]
    except ValueError as error:
        assert not isinstance(error, UnicodeDecodeError)


def test_send_writes_whole_frames() -> None:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        for message in CONTROL:
            send(ours, message)
        ours.shutdown(socket.SHUT_WR)
        received = b""
        while data := theirs.recv(1 << 16):
            received += data
    assert received == STREAM
