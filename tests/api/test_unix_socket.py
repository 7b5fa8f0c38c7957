"""Clients of a server on a Unix socket: ours, aiohttp's, and what they may ask."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.api.canned import CannedService
from tests.api.conftest import OPTIONS
from tinfer.api.connection import connections
from tinfer.api.limits import KEEP_ALIVE_S
from tinfer.api.render import Renderer
from tinfer.api.server import create_app, create_runner
from tinfer.client import AsyncClient, Client, ConnectionFailed
from tinfer.master.listener import Door, bind_unix
from tinfer.unix_socket import inode_of, remove_own


@pytest.fixture
async def path(model_dir: Path) -> AsyncIterator[str]:
    """The socket of a canned server."""
    runner = create_runner(create_app(CannedService(), await Renderer.load(model_dir), OPTIONS))
    await runner.setup()
    path = f"{os.environ['TMPDIR']}/s.sock"
    door = Door(bind_unix(path), 1 << 20)
    inode = inode_of(path)
    door.open(connections(runner, KEEP_ALIVE_S))
    yield path
    door.close()
    remove_own(path, inode)
    await runner.cleanup()


async def test_our_client(path: str) -> None:
    async with AsyncClient(f"unix:{path}") as client:
        assert client.base_url == f"unix:{path}"
        assert (await client.chat("hi")).text == "Hello"
        async with client.stream_completions("a") as stream:
            assert "".join([chunk.text async for chunk in stream]) == "Hello"
        # Who may open the socket may look inside.
        assert await client.ledger() == {"open_requests": 0}


async def test_our_client_without_asyncio(path: str) -> None:
    def ask() -> str:
        with Client(f"unix:{path}") as client:
            return client.completions("a").text

    assert await asyncio.to_thread(ask) == "Hello"


async def test_clients_of_others_whatever_they_call_the_host(path: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session:
        async with session.get("http://any.name.example.org/debug/state") as response:
            assert response.status == 200
        async with session.get("http://x/v1/models") as response:
            assert (await response.json())["data"][0]["id"] == "tiny"


async def test_where_no_server_is() -> None:
    async with AsyncClient("unix:/no/such/socket", max_retries=0) as client:
        with pytest.raises(ConnectionFailed, match="unix:/no/such/socket"):
            await client.models()
