"""The master's socket against real peers: well-behaved, broken, too many at once, and gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

from tinfer.wire.links import Incarnation, MasterLink, incarnation_of
from tinfer.wire.messages import (
    Aborted,
    PeerDown,
    Stop,
    ToMaster,
    Wake,
    decode_to_worker,
    encode,
)

Received = list[tuple[Incarnation, ToMaster]]


class Wire:
    """One `MasterLink` and the raw sockets of its workers."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "s")
        self.received: Received = []
        self.arrived = asyncio.Event()
        self.link = MasterLink(self.path, self._receive)
        self.fail_on: ToMaster | None = None
        self._context = zmq.Context(1)
        self._sockets: list[zmq.Socket[bytes]] = []

    def _receive(self, sender: Incarnation, message: ToMaster) -> None:
        if message == self.fail_on:
            raise RuntimeError("the receiver has an error")
        self.received.append((sender, message))
        self.arrived.set()

    def worker(self, identity: bytes) -> zmq.Socket[bytes]:
        dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, identity)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{self.path}")
        self._sockets.append(dealer)
        return dealer

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                self.arrived.clear()
                await self.arrived.wait()

    def close(self) -> None:
        self.link.close()
        for dealer in self._sockets:
            dealer.close(0)
        self._context.term()


@pytest.fixture
async def wire(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Wire]:
    wire = Wire(tmp_path_factory.mktemp("w"))
    yield wire
    wire.close()


@given(st.text(min_size=1), st.integers(0, 2**40))
def test_an_identity_names_its_incarnation(worker_id: str, generation: int) -> None:
    incarnation = Incarnation(worker_id, generation)
    assert incarnation_of(incarnation.identity) == incarnation


@given(st.binary(max_size=20))
@example(b"w. 1")
@example(b"w.+1")
@example(b"w.-1")
@example(b"w.1_0")
@example(b"w.01")
@example("w.\u0661".encode())
@example(b".1")
@example(b"w.")
@example(b"w")
@example(b"\xff.1")
def test_anything_else_names_none(identity: bytes) -> None:
    try:
        incarnation = incarnation_of(identity)
    except ValueError:
        return
    assert incarnation.worker_id and incarnation.generation >= 0
    assert incarnation.identity == identity


async def test_messages_arrive_in_order_and_with_their_sender(wire: Wire) -> None:
    first, second = wire.worker(b"p-0.1"), wire.worker(b"d-0.2")
    for n in range(500):  # more than the link handles in one go
        first.send(encode(Aborted([f"p{n}"])))
        second.send(encode(Aborted([f"d{n}"])))
    await wire.until(lambda: len(wire.received) == 1000)
    for sender, name in ((Incarnation("p-0", 1), "p"), (Incarnation("d-0", 2), "d")):
        of_sender = [message for who, message in wire.received if who == sender]
        assert of_sender == [Aborted([f"{name}{n}"]) for n in range(500)]


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [b"\x81\xa4type\xa1\xff"],
        [encode(Stop())],
        [encode(Aborted(["r"])), b"more"],
    ],
)
async def test_what_is_no_message_is_dropped_and_the_next_one_is_read(
    wire: Wire, frames: list[bytes]
) -> None:
    worker = wire.worker(b"p-0.1")
    worker.send_multipart(frames)
    worker.send(encode(Aborted(["next"])))
    await wire.until(lambda: bool(wire.received))
    assert wire.received == [(Incarnation("p-0", 1), Aborted(["next"]))]


async def test_a_stranger_is_not_heard(wire: Wire) -> None:
    wire.worker(b"stranger").send(encode(Aborted(["no"])))
    wire.worker(b"p-0.1").send(encode(Aborted(["yes"])))
    await wire.until(lambda: bool(wire.received))
    assert wire.received == [(Incarnation("p-0", 1), Aborted(["yes"]))]


async def test_an_error_of_the_receiver_does_not_hold_up_the_rest(wire: Wire) -> None:
    errors: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: errors.append(context["exception"]))
    wire.fail_on = Aborted(["bad"])
    worker = wire.worker(b"p-0.1")
    for name in ("bad", "bad", "good"):
        worker.send(encode(Aborted([name])))
    await wire.until(lambda: bool(wire.received))
    assert wire.received == [(Incarnation("p-0", 1), Aborted(["good"]))]
    assert [str(error) for error in errors] == ["the receiver has an error"] * 2


async def test_a_message_reaches_its_incarnation_only(wire: Wire) -> None:
    new, other = wire.worker(b"p-0.2"), wire.worker(b"d-0.1")
    for worker in (new, other):
        worker.send(encode(Aborted([])))
    await wire.until(lambda: len(wire.received) == 2)
    wire.link.send(Incarnation("p-0", 1), Stop())  # an older one, gone
    wire.link.send(Incarnation("nobody", 1), Stop())
    wire.link.send(Incarnation("p-0", 2), PeerDown("d-0", 1))
    wire.link.send(Incarnation("d-0", 1), Wake())
    assert new.poll(10_000) and other.poll(10_000)
    assert decode_to_worker(new.recv(zmq.NOBLOCK)) == PeerDown("d-0", 1)
    assert decode_to_worker(other.recv(zmq.NOBLOCK)) == Wake()


async def test_a_second_peer_of_one_identity_is_not_heard(wire: Wire) -> None:
    worker = wire.worker(b"p-0.1")
    worker.send(encode(Aborted(["first"])))
    await wire.until(lambda: bool(wire.received))
    wire.worker(b"p-0.1").send(encode(Aborted(["impostor"])))
    worker.send(encode(Aborted(["second"])))
    await wire.until(lambda: len(wire.received) == 2)
    assert [message for _, message in wire.received] == [Aborted(["first"]), Aborted(["second"])]


async def test_nothing_is_sent_after_the_end(wire: Wire) -> None:
    worker = wire.worker(b"p-0.1")
    worker.send(encode(Aborted(["r"])))
    await wire.until(lambda: bool(wire.received))
    wire.link.close()
    wire.link.close()
    wire.link.send(Incarnation("p-0", 1), Stop())
    assert not worker.poll(0)
