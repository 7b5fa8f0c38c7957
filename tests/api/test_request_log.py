"""The id that comes back with every answer, and the line that the log has of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.api.canned import say
from tests.api.conftest import Server, send
from tests.api.test_trace import trace
from tinfer.api.keys import ApiKeys
from tinfer.api.request_log import LEFT
from tinfer.errors import Overloaded

COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
HEADER = "X-Request-Id"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "ab"},
    CHATS: {"messages": [{"role": "user", "content": "hi"}]},
}


async def ask(
    server: Server, path: str = COMPLETIONS, own_id: str | None = None, **body: Any
) -> tuple[int, str | None, str]:
    """Status, the id that came back, and the body."""
    headers = {} if own_id is None else {HEADER: own_id}
    body = {**BODIES[path], **body}
    async with server.session.post(server.url + path, json=body, headers=headers) as response:
        return response.status, response.headers.get(HEADER), await response.text()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_a_clients_own_id_comes_back(server: Server, path: str, stream: bool) -> None:
    status, shown, text = await ask(server, path, "my id/7", stream=stream)
    assert (status, shown) == (200, "my id/7")
    assert '-my id/7"' in text
    _, shown, text = await ask(server, path, request_id="of-the-body", stream=stream)
    assert shown == "of-the-body" and '-of-the-body"' in text
    _, shown, text = await ask(server, path, "first", request_id="second", stream=stream)
    assert shown == "first" and '-first"' in text


async def test_an_id_is_made_where_there_is_none(server: Server) -> None:
    seen = set()
    for _ in range(3):
        _, shown, text = await ask(server)
        assert shown and f'-{shown}"' in text
        seen.add(shown)
    assert len(seen) == 3


async def test_errors_carry_it_too(server: Server) -> None:
    assert (await ask(server, own_id="mine", max_tokens=-1))[:2] == (400, "mine")
    server.service.script = lambda _: Overloaded("full", 1.0)
    assert (await ask(server, own_id="mine"))[:2] == (429, "mine")
    async with server.session.get(server.url + "/nothing", headers={HEADER: "mine"}) as response:
        assert (response.status, response.headers[HEADER]) == (404, "mine")


@pytest.mark.parametrize("own_id", ["a\r\nX-Evil: 1", "ü", " ", "a\tb", "r" * 256 + "s"])
async def test_what_no_header_can_carry_does_not_come_back(server: Server, own_id: str) -> None:
    status, shown, _ = await ask(server, request_id=own_id)
    assert (status, shown) == (200 if len(own_id) < 257 else 400, shown)
    assert shown is None or own_id not in shown


# --- the log -------------------------------------------------------------------------------------


class Access(logging.Handler):
    """The lines of the log of requests, as they are written."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: asyncio.Queue[logging.LogRecord] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put_nowait(record)

    async def line(self) -> logging.LogRecord:
        """The next one; the handler writes it after the client has its answer."""
        return await self._lines.get()


@pytest.fixture
async def access() -> AsyncIterator[Access]:
    log, handler = logging.getLogger("tinfer.access"), Access()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_per_request(server: Server, access: Access, stream: bool) -> None:
    server.service.script = lambda _: say(
        "ab", "c", reason="length", trace=trace(), cached_tokens=1
    )
    await ask(server, own_id="mine", prompt="a prompt to keep", stream=stream)
    record = await access.line()
    assert record.getMessage() == "POST /v1/completions 200"
    said = {name: record.__dict__[name] for name in ("request_id", "finish_reason", "restarts")}
    assert said == {"request_id": "mine", "finish_reason": "length", "restarts": trace().restarts}
    assert (record.__dict__["route"], record.__dict__["ttft_s"]) == (trace().route, trace().ttft_s)
    tokens = [record.__dict__[f"{kind}_tokens"] for kind in ("prompt", "cached", "output")]
    assert tokens == [17, 1, 3]
    assert record.__dict__["duration_s"] >= 0
    assert "keep" not in str(record.__dict__)


async def test_several_answers_are_lists(server: Server, access: Access) -> None:
    reasons = ("stop", "length")
    server.service.script = lambda index: say("a", reason=reasons[index], trace=trace())
    await ask(server, n=2)
    record = await access.line()
    assert record.__dict__["finish_reason"] == ["stop", "length"]
    assert record.__dict__["route"] == [trace().route] * 2


@pytest.mark.parametrize("options", [{"api_keys": ApiKeys(["sk-one"])}], indirect=True)
async def test_a_refusal_has_its_status(server: Server, access: Access) -> None:
    await ask(server)
    record = await access.line()
    assert record.getMessage() == "POST /v1/completions 401"
    assert "route" not in record.__dict__


async def test_a_path_that_is_none_is_not_repeated(server: Server, access: Access) -> None:
    async with server.session.get(server.url + "/x%0aINFO%20lie") as response:
        assert response.status == 404
    assert (await access.line()).getMessage() == "GET (no such path) 404"


async def test_a_client_that_leaves(server: Server, access: Access) -> None:
    server.service.script = lambda _: [*say("a", "b")[:1], asyncio.Event()]
    reader, writer = await send(server, COMPLETIONS, {"prompt": "a", "stream": True})
    await reader.readuntil(b"data: ")
    writer.close()
    record = await access.line()
    assert record.getMessage() == f"POST /v1/completions {LEFT}"
    assert (record.__dict__["output_tokens"], record.__dict__["finish_reason"]) == (1, None)


async def test_who_watches_is_not_worth_a_line(server: Server, access: Access) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        async with server.session.get(server.url + path) as response:
            await response.read()
    assert (await access.line()).getMessage() == "GET /v1/models 200"
