"""The canned server in a thread of its own, for clients that block, and one such client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import http.client
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from tests.api.canned import CannedService, say, token
from tests.api.described import Document
from tinfer.api.openapi import document
from tinfer.api.options import ApiOptions
from tinfer.api.render import Renderer
from tinfer.api.server import ENDPOINTS, create_app, create_runner
from tinfer.api.service import Delta

# An answer that takes longer is a hang: the canned ones take milliseconds.
HANG_S = 20.0


@dataclass
class Blocking:
    """One connection to a server; every answer has to be as its document says."""

    connection: http.client.HTTPConnection
    service: CannedService
    document: Document
    loop: asyncio.AbstractEventLoop

    def ask(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], at: str = ""
    ) -> int:
        """Send one request, fail for an answer that is not described; returns the status."""
        self.connection.request(method, at or path, body, dict(headers))
        response = self.connection.getresponse()
        said = response.read()
        self.document.check((method, path), response.status, dict(response.headers), said)
        asyncio.run_coroutine_threadsafe(self.service.forget(), self.loop).result(HANG_S)
        return response.status


def _answer() -> list[Delta | BaseException]:
    """Two tokens with all that any request may ask to see of them; the prompt has one."""
    head = Delta("H", [72], [token("H", top=2)], prompt_logprobs=[None])
    return [head, *say("i", logprobs=[token("i", top=2)])]


@contextlib.contextmanager
def served(model_dir: Path, options: ApiOptions) -> Iterator[Blocking]:
    """A server that lives as long as the block."""
    made: concurrent.futures.Future[tuple[str, int, asyncio.AbstractEventLoop]]
    made = concurrent.futures.Future()
    service = CannedService()
    service.script = lambda _: _answer()
    stop = asyncio.Event()

    async def live() -> None:
        renderer = await Renderer.load(model_dir)
        runner = create_runner(create_app(service, renderer, options), shutdown_timeout_s=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.set_result((*runner.addresses[0][:2], asyncio.get_running_loop()))
        await stop.wait()
        await runner.cleanup()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ended = pool.submit(asyncio.run, live())
        host, port, loop = made.result()
        connection = http.client.HTTPConnection(host, port, timeout=HANG_S)
        try:
            described = Document(document(ENDPOINTS, options.version))
            yield Blocking(connection, service, described, loop)
        finally:
            connection.close()
            loop.call_soon_threadsafe(stop.set)
            ended.result()
