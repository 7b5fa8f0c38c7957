"""What a dead incarnation still has to say is not heard, on the real socket of a real master."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from tests.process.box import Server, running
from tests.process.load import completion
from tests.wire.samples import TO_MASTER
from tinfer.wire.messages import Idle, Output, Step, ToMaster, WorkerStats, encode

FAKE = {"num_blocks": 256, "block_tokens": 8}


@contextmanager
def voice(server: Server, identity: bytes) -> Iterator[zmq.Socket[bytes]]:
    """A socket that speaks to the master under that identity."""
    context = zmq.Context(1)
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.connect(f"ipc://{server.process.run_dir() / 'workers.sock'}")
        yield socket
    finally:
        socket.close(10_000)
        context.term()


IDENTITIES = [b"decode-0.1", b"decode-0.3", b"decode-0. 2", b"decode-7.1", b"nobody", b"\xff"]


async def test_only_the_living_incarnation_is_heard(tmp_path: Path) -> None:
    with running(tmp_path, FAKE) as server:
        await server.signal("decode-0", signal.SIGKILL)
        await server.until_worker("decode-0", "ready", generation=2)
        stats = WorkerStats(num_used_blocks=77, num_stale_mappings=3, num_steps=10**6)
        ended = Output("r-1", [5], 1, "lie", 3, finish_reason="stop")
        lies: list[ToMaster] = [*TO_MASTER, Idle(stats), Step([ended], stats)]
        before = await server.workers()
        for identity in IDENTITIES:
            with voice(server, identity) as socket:
                for lie in lies:
                    socket.send(encode(lie))
                socket.send(b"\x81\xa4type\xa1\xff")
                socket.send_multipart([b"", encode(Idle(stats))])
        request = completion([1, 2, 3] * 20)
        await server.answer(request)
        request.check_answered(server.settings)
        await server.idle(num_finished=1)
        for name, worker in (await server.workers()).items():
            for key in ("state", "generation", "pid", "reason", "num_blocks"):
                assert worker[key] == before[name][key]
            assert worker["reason"] == ""
            assert worker["engine"]["num_steps"] < 10**6
        server.stop()
