"""More clients than descriptors, and clients that come too early: told so, and no harm done."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from tests.e2e.serving import ServeProcess, serving
from tests.process.box import Server, until
from tests.process.load import completion, fake_flags
from tinfer.master.limits import MIN_CLIENTS, RESERVED_DESCRIPTORS, RESERVED_PER_WORKER
from tinfer.master.listener import Door
from tinfer.worker.fake_settings import FakeSettings

NUM_CLIENTS = 200
# Lower than what this process has, so that any user may set it.
HARD_LIMIT = 160


def with_limit(number: int) -> list[str]:
    """A command that cannot open more files than that, soft and hard."""
    return ["sh", "-c", f'ulimit -n {number} && exec "$@"', "sh"]


class Client:
    """One connection that is kept open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; status 0 where the connection was closed without an answer."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, b""
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length is not None
        return int(head.split()[1]), await self._reader.readexactly(int(length.group(1)))

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return  # the server was first


@asynccontextmanager
async def clients(url: str, number: int) -> AsyncIterator[list[Client]]:
    host, port = url.removeprefix("http://").split(":")
    made = [Client(*await asyncio.open_connection(host, int(port))) for _ in range(number)]
    try:
        yield made
    finally:
        for one in made:
            await one.close()


async def health(url: str) -> tuple[int, bytes]:
    async with clients(url, 1) as (one,):
        return await one.get("/health")


async def test_more_clients_than_descriptors(tmp_path: Path) -> None:
    flags = fake_flags({}, prefill=1, decode=1, log_dir=tmp_path)
    with serving(tmp_path, *flags, prefix=with_limit(HARD_LIMIT)) as process:
        server = Server(process, FakeSettings())
        await health(process.url)  # the first connection makes the loop open a file of its own
        before = await server.num_descriptors()
        async with clients(process.url, NUM_CLIENTS) as many:
            answers = await asyncio.gather(*(one.get("/health") for one in many))
            statuses = [status for status, _ in answers]
            num_in = statuses.count(200)
            assert set(statuses) <= {200, 503, 0}
            reserved = RESERVED_DESCRIPTORS + 2 * RESERVED_PER_WORKER
            # Clients get what is below the reserve and not the server's own, give or take a few.
            assert HARD_LIMIT - reserved - before - 4 <= num_in < HARD_LIMIT - reserved
            refusals = [msgspec.json.decode(body) for status, body in answers if status == 503]
            assert refusals, "nobody was told"
            assert {r["error"]["message"] for r in refusals} == {"too many open connections"}
            # Those that are in are served, and workers too can still be started.
            again = await asyncio.gather(*(one.get("/health") for one in many[:num_in]))
            assert [status for status, _ in again] == statuses[:num_in]
        await server.num_descriptors(before)

        async def look() -> tuple[int, bytes]:
            return await health(process.url)

        await until(look, lambda answer: answer[0] == 200)
        request = completion([5] * 20, max_tokens=4)
        await server.answer(request)
        assert request.status == 200
        assert "Too many open files" not in process.output
        server.stop()


async def test_a_limit_that_leaves_nothing_for_clients(tmp_path: Path) -> None:
    reserved = RESERVED_DESCRIPTORS + RESERVED_PER_WORKER
    number = reserved + MIN_CLIENTS - 1
    server = ServeProcess(tmp_path, *fake_flags({}, prefill=1, decode=0), prefix=with_limit(number))
    try:
        assert await asyncio.to_thread(server.wait_end) == 2
        assert server.error_line.startswith(
            f"tinfer: the limit of {number} open files is too low, {number + 1} are needed: "
        )
    finally:
        server.stop()


async def test_the_soft_limit_is_raised_and_workers_get_a_sane_one(tmp_path: Path) -> None:
    flags = fake_flags({}, prefill=1, decode=1, log_dir=tmp_path)
    low = ["sh", "-c", 'ulimit -Sn 100 && exec "$@"', "sh"]
    with serving(tmp_path, *flags, prefix=low) as process:
        (soft, hard), *others = [_descriptor_limit(p.pid) for p in process.family()]
        assert soft == hard
        assert others == [(min(hard, 65535), hard)] * 3


def _descriptor_limit(pid: int) -> tuple[int, int]:
    words = re.search(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{pid}/limits").read_text())
    assert words is not None
    return int(words.group(1)), int(words.group(2))


class _Exhausted(socket.socket):
    """Can accept only from the third time on, as in a process that has no descriptor left."""

    num_tries = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.num_tries += 1
        if self.num_tries < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_an_accept_that_fails_is_tried_again_after_a_pause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loop does not spin meanwhile, and the client that waits is served in the end."""
    with _Exhausted() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        door = Door(listener, end_descriptor=1 << 20)
        try:
            status, _ = await health(f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            door.close()
        assert status == 503  # nobody has opened the door
        # Two that failed, one that worked, one that found nobody else.
        assert listener.num_tries == 4
        assert caplog.text.count("cannot accept connections") == 2


async def test_a_client_that_comes_before_the_server_is_ready(tmp_path: Path) -> None:
    server = ServeProcess(tmp_path, *fake_flags({"start_s": 1000.0}, prefill=1, decode=0))
    try:
        server.wait_progress("starting workers")
        (port,) = {
            c.laddr.port for c in server.family()[0].net_connections("tcp") if c.status == "LISTEN"
        }
        async with clients(f"http://127.0.0.1:{port}", 100) as many:
            # The rest is closed without an answer: only so many may keep a descriptor.
            answers = [await one.get("/health") for one in many[:8]]
        for status, body in answers:
            assert status == 503
            assert msgspec.json.decode(body)["error"]["message"] == "the server is starting"
    finally:
        server.stop()
