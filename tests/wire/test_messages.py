"""Every message survives the wire; everything else is a `DecodeError`, whatever its bytes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from tests.wire.samples import TO_MASTER, TO_WORKER
from tests.wire.strategies import any_of
from tinfer.wire.messages import (
    ToMaster,
    ToWorker,
    decode_to_master,
    decode_to_worker,
    encode,
)

Decode = Callable[[Any], Struct]
CHANNELS: list[tuple[list[Struct], Decode]] = [
    (list(TO_WORKER), decode_to_worker),
    (list(TO_MASTER), decode_to_master),
]
SAMPLES = [(sample, decode) for samples, decode in CHANNELS for sample in samples]


@given(any_of(ToWorker))
def test_to_worker_round_trip(message: Struct) -> None:
    assert decode_to_worker(encode(message)) == message


@given(any_of(ToMaster))
def test_to_master_round_trip(message: Struct) -> None:
    assert decode_to_master(encode(message)) == message


@pytest.mark.parametrize(("sample", "decode"), SAMPLES)
def test_a_field_that_is_not_declared_is_an_error(sample: Struct, decode: Decode) -> None:
    fields = msgspec.msgpack.decode(encode(sample))
    assert decode(msgspec.msgpack.encode(fields)) == sample
    with pytest.raises(msgspec.DecodeError, match="surprise"):
        decode(msgspec.msgpack.encode({**fields, "surprise": 1}))


@pytest.mark.parametrize(("sample", "decode"), SAMPLES)
def test_every_required_field_is_required_and_typed(sample: Struct, decode: Decode) -> None:
    fields = msgspec.msgpack.decode(encode(sample))
    for field in msgspec.structs.fields(sample):
        if field.required:
            without = {name: value for name, value in fields.items() if name != field.name}
            with pytest.raises(msgspec.DecodeError, match=field.name):
                decode(msgspec.msgpack.encode(without))
        with pytest.raises(msgspec.DecodeError):
            decode(msgspec.msgpack.encode({**fields, field.name: [{"no": "such"}]}))


@pytest.mark.parametrize(("sample", "decode"), SAMPLES)
def test_other_and_missing_tags_are_errors(sample: Struct, decode: Decode) -> None:
    fields = msgspec.msgpack.decode(encode(sample))
    for tag in ("", "start", "Fork", 1, None):
        with pytest.raises(msgspec.DecodeError):
            decode(msgspec.msgpack.encode({**fields, "type": tag}))
    del fields["type"]
    with pytest.raises(msgspec.DecodeError):
        decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(("sample", "decode"), SAMPLES)
def test_a_message_of_the_other_direction_is_an_error(sample: Struct, decode: Decode) -> None:
    other = decode_to_master if decode is decode_to_worker else decode_to_worker
    with pytest.raises(msgspec.DecodeError):
        other(encode(sample))


@pytest.mark.parametrize(("sample", "decode"), SAMPLES)
def test_every_truncation_and_any_trailing_byte_is_an_error(sample: Struct, decode: Decode) -> None:
    data = encode(sample)
    for end in range(len(data)):
        with pytest.raises(msgspec.DecodeError):
            decode(data[:end])
    with pytest.raises(msgspec.DecodeError):
        decode(data + b"\xc0")


@pytest.mark.parametrize(("sample", "decode"), SAMPLES)
def test_a_changed_byte_gives_a_message_or_an_error(sample: Struct, decode: Decode) -> None:
    data = encode(sample)
    for index in range(len(data)):
        for byte in (0x00, 0x7F, 0x80, 0xC1, 0xFF, data[index] ^ 1):
            broken = bytearray(data)
            broken[index] = byte
            _read(decode, bytes(broken))


@given(st.binary(max_size=200))
def test_random_bytes_give_a_message_or_an_error(data: bytes) -> None:
    _read(decode_to_worker, data)
    _read(decode_to_master, data)


@given(st.recursive(st.none() | st.integers(0, 255), lambda inner: st.lists(inner, max_size=3)))
def test_other_msgpack_is_an_error(body: Any) -> None:
    for decode in (decode_to_worker, decode_to_master):
        with pytest.raises(msgspec.DecodeError):
            decode(msgspec.msgpack.encode(body))


def test_deep_nesting_is_an_error() -> None:
    for start in (b"", b"\x81\xa1x"):  # the second: in a field that no message has
        for deeper in (b"\x91", b"\x81\xa4type"):
            for decode in (decode_to_worker, decode_to_master):
                with pytest.raises(msgspec.DecodeError):
                    decode(start + deeper * 100_000)


def test_prompts_are_little_endian_int32() -> None:
    start = TO_WORKER[0]
    assert decode_to_worker(encode(start)) == start
    data = encode(start)
    assert (5).to_bytes(4, "little") + (300).to_bytes(4, "little") in data


def _read(decode: Decode, data: bytes) -> None:
    """Nothing but a `DecodeError` may come of it, and a message that comes is a whole one."""
    try:
        message = decode(data)
    except msgspec.DecodeError:
        return
    assert encode(decode(encode(message))) == encode(message)  # bytes, since NaN != NaN
