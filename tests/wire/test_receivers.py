"""Those who read from the sockets go on, whatever comes: one line in the log, and the next message.

The master's link, with real peers of libzmq and with peers that do not speak its protocol; and a
worker's loop, with frames that are broken and with messages that are whole and make no sense.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings

from tests.unit.fake_box import ROOMY, spec_of
from tests.wire.mutations import broken
from tests.wire.samples import TO_MASTER, TO_WORKER
from tests.wire.strategies import any_of
from tests.wire.test_links import Wire
from tinfer.core.sampling import SamplingSpec
from tinfer.wire.links import Incarnation
from tinfer.wire.messages import (
    MAX_MESSAGE_BYTES,
    Aborted,
    ExtendLease,
    LeaseId,
    PeerUp,
    Refused,
    SetBudget,
    Source,
    Start,
    Step,
    Stop,
    ToMaster,
    ToWorker,
    decode_to_master,
    decode_to_worker,
    encode,
)
from tinfer.worker.fake_engine import FakeEngine
from tinfer.worker.fake_model import prompt_bytes
from tinfer.worker.loop import WorkerLoop

PREFILL = Incarnation("p-0", 1)
NUM_FRAMES = 400


@pytest.fixture
async def wire(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Wire]:
    wire = Wire(tmp_path_factory.mktemp("w"))
    yield wire
    wire.close()


# --- the master's link -----------------------------------------------------------------------


async def test_the_link_drops_broken_frames_with_one_line_each(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(1)
    good = [encode(message) for message in TO_MASTER]
    worker = wire.worker(PREFILL.identity)
    num_broken = 0
    for number in range(NUM_FRAMES):
        _, data = broken(rng, good)
        try:
            decode_to_master(data)
        except msgspec.DecodeError:
            worker.send(data)
            num_broken += 1
        worker.send(encode(Aborted([str(number)])))
    await wire.until(lambda: len(wire.received) == NUM_FRAMES)
    assert wire.received == [(PREFILL, Aborted([str(n)])) for n in range(NUM_FRAMES)]
    lines = [record for record in caplog.records if record.name == "tinfer.wire.links"]
    assert len(lines) == num_broken > NUM_FRAMES // 2
    for record in lines:
        text = record.getMessage()
        assert record.exc_info is None and text.isprintable() and len(text) < 400


class Lines(logging.Handler):
    """The lines of a logger; each wakes the one who waits for them."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._wire.arrived.set()


async def test_the_link_drops_what_comes_from_no_incarnation(wire: Wire) -> None:
    names = [b"x", b"p-0.", b".1", b"p-0.-1", b"p-0.1e3", b"\xff\xfe.1"]
    seen, log = Lines(wire), logging.getLogger("tinfer.wire.links")
    log.addHandler(seen)
    try:
        for name in names:
            wire.worker(name).send(encode(Aborted(["foreign"])))
        await wire.until(lambda: len(seen.lines) == len(names))
        wire.worker(PREFILL.identity).send(encode(Aborted(["own"])))
        await wire.until(lambda: bool(wire.received))
    finally:
        log.removeHandler(seen)
    assert wire.received == [(PREFILL, Aborted(["own"]))]
    assert all(any(ascii(name) in line for line in seen.lines) for name in names)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)


def ready(identity: bytes) -> bytes:
    """The NULL mechanism's only command. Source: ZMTP 3.0, RFC 23 of ZeroMQ."""
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", identity)):
        body += bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
    return b"\x04" + bytes([len(body)]) + body


CLAIMS = [MAX_MESSAGE_BYTES + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
HANDSHAKE = GREETING + ready(b"x.1")
RAW = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(4096),
    "no handshake": GREETING + b"\xff" * 100,
    "half a greeting": GREETING[:20],
    "an unknown mechanism": GREETING.replace(b"NULL", b"NONE"),
    "a command of no meaning": GREETING + b"\x04\x03\x02ab",
    **{
        f"a frame of {claim} bytes": HANDSHAKE + b"\x02" + struct.pack(">Q", claim)
        for claim in CLAIMS
    },
}


@pytest.mark.parametrize("sent", RAW.values(), ids=list(RAW))
async def test_a_peer_that_does_not_speak_the_protocol_disturbs_nobody(
    wire: Wire, sent: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(wire.path)
        raw.sendall(sent)
        worker = wire.worker(PREFILL.identity)
        worker.send(encode(Aborted(["heard"])))
        await wire.until(lambda: bool(wire.received))
        assert wire.received == [(PREFILL, Aborted(["heard"]))]


@pytest.mark.parametrize("claim", CLAIMS)
async def test_a_peer_that_promises_too_much_is_disconnected(wire: Wire, claim: int) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(wire.path)
        raw.sendall(HANDSHAKE)
        raw.settimeout(10)
        while not (said := raw.recv(1 << 16)).endswith(b"Identity\0\0\0\0"):
            assert said, "closed within the handshake"
        raw.sendall(b"\x02" + struct.pack(">Q", claim))
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""


# --- a worker's loop -------------------------------------------------------------------------


class Box:
    """A worker's loop over a pair of sockets, run by hand."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.ours, theirs = self.context.socket(zmq.PAIR), self.context.socket(zmq.PAIR)
        self.theirs = theirs
        self.ours.bind("inproc://worker")
        theirs.connect("inproc://worker")
        self.engine = FakeEngine(spec_of(ROOMY))
        self.loop = WorkerLoop(self.engine, theirs)

    def turn(self) -> None:
        """What `run` does in one turn, without the wait."""
        self.loop._read_messages()
        self.loop._step()

    def heard(self) -> list[ToMaster]:
        messages = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(decode_to_master(self.ours.recv(zmq.NOBLOCK)))
        return messages

    def answers(self, request_id: str = "last") -> bool:
        """Whether a request that comes now is computed to its end."""
        prompt = prompt_bytes([1, 2, 3])
        sampling = SamplingSpec(max_tokens=3, ignore_eos=True)
        self.ours.send(encode(SetBudget(None)))
        self.ours.send(encode(Start(request_id, "whole", prompt, sampling)))
        for _ in range(20_000):
            self.turn()
            for message in self.heard():
                if isinstance(message, Step):
                    for output in message.outputs:
                        if output.request_id == request_id and output.finish_reason == "length":
                            return True
        return False

    def close(self) -> None:
        self.engine.close()
        self.ours.close(0)
        self.theirs.close(0)
        self.context.term()


@pytest.fixture
def box() -> Iterator[Box]:
    box = Box()
    yield box
    box.close()


def test_the_loop_goes_on_after_broken_frames(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rng = random.Random(2)
    good = [encode(message) for message in TO_WORKER]
    num_broken = 0
    for _ in range(NUM_FRAMES):
        _, data = broken(rng, good)
        try:
            if isinstance(decode_to_worker(data), Stop):
                continue
        except msgspec.DecodeError:
            num_broken += 1
        box.ours.send(data)
        box.turn()
    lines = [record for record in caplog.records if record.name == "tinfer.worker.loop"]
    assert len(lines) == num_broken > NUM_FRAMES // 2
    assert all(record.exc_info is None for record in lines)
    assert box.answers()


def test_the_loop_goes_on_after_messages_without_sense(box: Box) -> None:
    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(any_of(ToWorker))
    def check(message: ToWorker) -> None:
        if isinstance(message, Stop):
            return
        box.ours.send(encode(message))
        box.turn()

    check()
    assert box.answers()


PROMPT = prompt_bytes([1, 2, 3])
SAMPLING = SamplingSpec(max_tokens=3)
NO_BLOCKS = Source("d", 0, LeaseId(0, 1), 3, 1, b"\xc1")


def test_the_loop_refuses_forced_tokens_that_are_none(box: Box) -> None:
    box.ours.send(encode(Start("r", "whole", PROMPT, SAMPLING, forced_tokens=b"\1\2\3")))
    box.turn()
    (refused,) = box.heard()
    assert isinstance(refused, Refused) and not refused.client_fault


@pytest.mark.parametrize(
    "export", [b"", b"\xc1", b"\x80", b"\x93\1\2\3", b"\x81\xa1x" + b"\x91" * 9999]
)
def test_an_export_that_cannot_be_read_is_a_pull_that_fails(
    box: Box, export: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    box.ours.send(encode(PeerUp("d", 0, export)))
    box.ours.send(encode(Start("r", "decode", PROMPT, SAMPLING, source=NO_BLOCKS)))
    for _ in range(5):
        box.turn()
    assert box.answers()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("export of 'd' dropped" in line for line in lines) == 1
    assert sum("blocks of 'd' dropped" in line for line in lines) == 1


@pytest.mark.parametrize(
    "message",
    [
        SetBudget(-1),
        ExtendLease(LeaseId(0, 1), float("nan")),
        ExtendLease(LeaseId(0, 1), float("inf")),
        ExtendLease(LeaseId(0, 1), -1.0),
    ],
)
def test_numbers_that_mean_nothing_are_dropped(box: Box, message: ToWorker) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_to_worker(encode(message))
    box.ours.send(encode(message))
    box.turn()
    assert box.answers()
