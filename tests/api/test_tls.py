"""The door with TLS: answers, streams and refusals through it, and handshakes that go wrong.

On uvloop, as the server: its TLS is not asyncio's.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import openai
import psutil
import pytest
import uvloop

from tests.api.canned import CannedService, say
from tests.api.conftest import OPTIONS
from tests.certificates import Authority
from tinfer.api.connection import connections
from tinfer.api.limits import KEEP_ALIVE_S
from tinfer.api.render import Renderer
from tinfer.api.server import create_app, create_runner
from tinfer.api.service import Delta
from tinfer.client import AsyncClient, ConnectionFailed
from tinfer.config import load
from tinfer.errors import StartError
from tinfer.master import listener as door_module
from tinfer.master.listener import Door, bind
from tinfer.master.tls import server_context

NO_END = 1 << 20
# More than the kernel keeps for a connection: 4 MiB at the sender, 6 at the reader.
NUM_PIECES = 20_000
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """libuv opens a descriptor with the first loop and keeps it."""
    uvloop.run(asyncio.sleep(0))


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**given: Any) -> None:
        uvloop.run(test(**given))

    return run


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> tuple[Path, Path]:
    return authority.issue("server")


def options(own: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    return {"ssl_certfile": str(own[0]), "ssl_keyfile": str(own[1]), **more}


class Open:
    """A door with the canned server behind it."""

    def __init__(self, door: Door, port: int, service: CannedService) -> None:
        self.door = door
        self.port = port
        self.url = f"https://127.0.0.1:{port}"
        self.service = service

    async def connect(self, tls: ssl.SSLContext | None) -> tuple[Any, Any]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=tls)

    async def until_open(self, number: int) -> None:
        """Wait until so many connections have this process at the server's end."""
        while self._num_open() != number:  # noqa: ASYNC110 - sockets tell nobody
            await asyncio.sleep(0.01)

    def _num_open(self) -> int:
        found = psutil.Process().net_connections("tcp")
        return sum(c.laddr.port == self.port and c.status != psutil.CONN_LISTEN for c in found)


Opened = Callable[..., Any]


@pytest.fixture
def opened(model_dir: Path) -> Opened:
    @asynccontextmanager
    async def open_door(
        tls: ssl.SSLContext | None, end: int = NO_END, is_open: bool = True
    ) -> AsyncIterator[Open]:
        service = CannedService()
        renderer = await Renderer.load(model_dir)
        runner = create_runner(create_app(service, renderer, OPTIONS), shutdown_timeout_s=1.0)
        await runner.setup()
        listening = bind("127.0.0.1", 0)
        door = Door(listening, end, tls)
        if is_open:
            door.open(connections(runner, KEEP_ALIVE_S))
        try:
            yield Open(door, listening.getsockname()[1], service)
        finally:
            door.close()
            await runner.cleanup()

    return open_door


@on_uvloop
async def test_clients(opened: Opened, authority: Authority, own: tuple[Path, Path]) -> None:
    tls = authority.trusting()
    async with opened(server_context(load(options(own)))) as there:
        async with AsyncClient(there.url, ssl_context=tls) as ours:
            assert (await ours.chat("hi")).text == "Hello"
            assert await ours.ledger()  # loopback, through TLS too
            async with ours.stream_chat("hi") as stream:
                assert "".join([chunk.text async for chunk in stream]) == "Hello"
        async with (
            openai.DefaultAsyncHttpxClient(verify=tls) as http,
            openai.AsyncOpenAI(base_url=there.url + "/v1", api_key="x", http_client=http) as other,
        ):
            done = await other.completions.create(model="tiny", prompt="a", stream=True)
            assert "".join([chunk.choices[0].text async for chunk in done]) == "Hello"


@on_uvloop
async def test_a_stream_that_is_longer_than_all_buffers(
    opened: Opened, authority: Authority, own: tuple[Path, Path]
) -> None:
    """What is written directly and what waits stay in order."""
    pieces = [f"{i:07d} " for i in range(5_000)]
    async with opened(server_context(load(options(own)))) as there:
        there.service.script = lambda index: say(*pieces)
        async with AsyncClient(there.url, ssl_context=authority.trusting()) as ours:
            async with ours.stream_completions("a", max_tokens=9) as stream:
                text = "".join([chunk.text async for chunk in stream])
        assert text == "".join(pieces)


@on_uvloop
async def test_a_client_that_leaves_is_noticed(
    opened: Opened, authority: Authority, own: tuple[Path, Path]
) -> None:
    never = asyncio.Event()
    async with opened(server_context(load(options(own)))) as there:
        there.service.script = lambda index: [Delta(text="a", token_ids=[1]), never]
        async with AsyncClient(there.url, ssl_context=authority.trusting()) as ours:
            async with ours.stream_completions("a") as stream:
                await anext(stream)
            await there.service.streams[0].cancelled.wait()


@on_uvloop
async def test_a_client_that_does_not_read_is_waited_for(
    opened: Opened, authority: Authority, own: tuple[Path, Path]
) -> None:
    """What it leaves stays in its stream: TLS buffers no more of it than a plain connection."""
    pieces = [Delta(text="x" * 1000, token_ids=[1])] * NUM_PIECES
    taken = [0, 0]

    def script(index: int) -> Iterator[Delta]:
        for piece in pieces:
            taken[index] += 1
            yield piece
        yield Delta(text="", token_ids=[], finish_reason="stop")

    tls = authority.trusting()
    async with opened(server_context(load(options(own)))) as there:
        there.service.script = cast(Any, script)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", there.port))
            # Its reader stops reading where its own small buffer is full.
            _, writer = await asyncio.open_connection(
                sock=sock, ssl=tls, server_hostname="localhost", limit=4096
            )
            body = b'{"prompt":"a","stream":true}'
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await there.service.started(1)
            async with AsyncClient(there.url, ssl_context=tls) as other:
                async with other.stream_completions("a") as stream:
                    num_read = sum([len(chunk.text) async for chunk in stream])
            assert (num_read, taken[1]) == (1000 * NUM_PIECES, NUM_PIECES)
            assert taken[0] < NUM_PIECES
            writer.transport.abort()
        await there.service.streams[0].cancelled.wait()


@on_uvloop
async def test_a_client_of_another_authority_and_one_without_tls(
    opened: Opened, own: tuple[Path, Path], tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with opened(server_context(load(options(own)))) as there:
        async with AsyncClient(there.url, ssl_context=stranger.trusting()) as ours:
            with pytest.raises(ConnectionFailed, match="no TLS"):
                await ours.models()
        async with AsyncClient(there.url.replace("https", "http"), max_retries=0) as ours:
            with pytest.raises(ConnectionFailed):
                await ours.models()


@pytest.mark.parametrize("reqs", [1, 2])
@on_uvloop
async def test_certificates_of_clients(
    opened: Opened, authority: Authority, own: tuple[Path, Path], reqs: int, tmp_path: Path
) -> None:
    more = {"ssl_ca_certs": str(authority.cert_path), "ssl_cert_reqs": reqs}
    known = authority.trusting(authority.issue("client"))
    stranger = authority.trusting(Authority(tmp_path, "stranger").issue("other"))
    async with opened(server_context(load(options(own, **more)))) as there:
        for tls, may in ((known, True), (authority.trusting(), reqs == 1), (stranger, False)):
            async with AsyncClient(there.url, ssl_context=tls, max_retries=0) as ours:
                if may:
                    assert await ours.models()
                    continue
                with pytest.raises(ConnectionFailed):
                    await ours.models()


# --- handshakes that go wrong ---------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"\x00" * 4000])
@pytest.mark.parametrize("is_open", [True, False])
@on_uvloop
async def test_what_is_no_handshake(
    opened: Opened,
    authority: Authority,
    own: tuple[Path, Path],
    sent: bytes,
    is_open: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Closed at once or in time, without a word in the log, and the next client is served."""
    monkeypatch.setattr(door_module, "HANDSHAKE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(door_module, "_REFUSAL_S", 0.3)
    caplog.set_level(logging.INFO)
    async with opened(server_context(load(options(own))), is_open=is_open) as there:
        reader, writer = await there.connect(None)
        writer.write(sent)
        assert len(await reader.read()) < 100  # an alert at most
        writer.close()
        await writer.wait_closed()
        async with aiohttp.ClientSession() as session:
            tls = authority.trusting()
            async with session.get(f"{there.url}/health", ssl=tls) as response:
                assert response.status == (200 if is_open else 503)
        await there.until_open(0)
    assert caplog.text == ""


@on_uvloop
async def test_the_end_does_not_wait_for_handshakes(opened: Opened, own: tuple[Path, Path]) -> None:
    async with opened(server_context(load(options(own)))) as there:
        _, writer = await there.connect(None)
        await there.until_open(1)
    await there.until_open(0)
    writer.close()


@pytest.mark.parametrize(("end", "is_open"), [(0, True), (NO_END, False)])
@on_uvloop
async def test_refusals(
    opened: Opened, authority: Authority, own: tuple[Path, Path], end: int, is_open: bool
) -> None:
    async with opened(server_context(load(options(own))), end, is_open) as there:
        reader, writer = await there.connect(authority.trusting())
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 503 ")
        assert (b"too many" if is_open else b"starting") in said
        writer.close()


# --- files ----------------------------------------------------------------------------------------


def test_files_that_cannot_be_used(
    authority: Authority, own: tuple[Path, Path], tmp_path: Path
) -> None:
    certfile, keyfile = map(str, own)
    other_key = str(authority.issue("other")[1])
    sealed = str(authority.issue("sealed", b"password")[1])
    nothing, text = str(tmp_path / "nothing.pem"), tmp_path / "text.pem"
    text.write_text("no certificate\n")
    cert = {"ssl_certfile": certfile}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"ssl_certfile": nothing}, "--ssl-certfile: cannot read .*No such file"),
        ({"ssl_certfile": str(tmp_path)}, "--ssl-certfile: cannot read .*directory"),
        ({"ssl_certfile": str(text)}, "--ssl-certfile .*no certificate"),
        (cert, "--ssl-certfile "),
        ({**cert, "ssl_keyfile": nothing}, "--ssl-keyfile: cannot read"),
        ({**cert, "ssl_keyfile": str(text)}, "--ssl-keyfile"),
        ({**cert, "ssl_keyfile": other_key}, "--ssl-keyfile .*mismatch"),
        ({"ssl_certfile": sealed, "ssl_keyfile": sealed}, "encrypted|no certificate"),
        (options(own, ssl_ca_certs=nothing), "--ssl-ca-certs: cannot read"),
        (options(own, ssl_ca_certs=str(text)), "--ssl-ca-certs"),
        (options(own, ssl_cert_reqs=2), "--ssl-cert-reqs needs --ssl-ca-certs"),
        ({"ssl_keyfile": keyfile}, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_ca_certs": certfile}, "--ssl-ca-certs needs --ssl-certfile"),
        ({"ssl_cert_reqs": 1}, "--ssl-cert-reqs needs --ssl-certfile"),
    ]
    for given, why in bad:
        with pytest.raises(StartError, match=why) as caught:
            server_context(load(given))
        assert "\n" not in caught.value.message


def test_one_file_may_hold_both(own: tuple[Path, Path], tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(own[0].read_bytes() + own[1].read_bytes())
    context = server_context(load({"ssl_certfile": str(both)}))
    assert context is not None
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert server_context(load({})) is None
