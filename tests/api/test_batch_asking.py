"""A batch's requests to a server that misbehaves: tried again, told as failed, or left open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from tests.api.wayward import Wayward, hang, refuse, reset, say, status, wayward
from tinfer.batch.asking import Asker, ServerGone
from tinfer.batch.lines import BadLine, Request, Result
from tinfer.client import AsyncClient, Usage

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ANSWER: dict[str, Any] = {"id": "cmpl-1", "choices": [], "usage": USAGE}
BUSY = refuse(429, "later", "TooManyRequestsError", Retry_After="0")


@pytest.fixture
async def server() -> AsyncIterator[Wayward]:
    async with wayward() as made:
        yield made


def work(*ids: str) -> Iterator[BadLine | Request]:
    for number, custom_id in enumerate(ids, 1):
        body = msgspec.Raw(b'{"prompt": "%s"}' % custom_id.encode())
        yield Request(number, custom_id, "/v1/completions", body)


async def ask(
    url: str, lines: Iterator[BadLine | Request], max_concurrency: int = 1, **client: Any
) -> list[tuple[Result, Usage | None]]:
    found: list[tuple[Result, Usage | None]] = []
    async with AsyncClient(url, **{"backoff_s": 0.0, **client}) as made:
        asker = Asker(made, lambda result, usage: found.append((result, usage)))
        await asker.ask_all(lines, max_concurrency)
    return found


def shown(results: Sequence[tuple[Result, Usage | None]]) -> list[tuple[str | None, int | str]]:
    """Each id with its status or the code of its error."""
    found: list[tuple[str | None, int | str]] = []
    for result, _ in results:
        assert (result.response is None) != (result.error is None)
        if result.response is not None:
            found.append((result.custom_id, result.response.status_code))
        elif result.error is not None:
            found.append((result.custom_id, result.error.code))
    return found


async def test_an_answer_is_kept_as_it_came_but_on_one_line(server: Wayward) -> None:
    server.does(status(200, '{\n  "id": "cmpl-1",\n  "big": 12345678901234567890.50\n}'))
    ((result, usage),) = await ask(server.url, work("a"))
    assert (result.custom_id, result.error, usage) == ("a", None, None)
    assert result.response is not None
    assert (result.response.status_code, result.response.request_id) == (200, "cmpl-1")
    assert bytes(result.response.body) == b'{"id":"cmpl-1","big":12345678901234567890.50}'
    assert server.seen[0].path == "/v1/completions" and server.seen[0].body == {"prompt": "a"}


async def test_the_servers_own_id_of_a_request_comes_first(server: Wayward) -> None:
    server.does(say(ANSWER, X_Request_Id="its own"))
    ((result, usage),) = await ask(server.url, work("a"))
    assert result.response is not None and result.response.request_id == "its own"
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (3, 2)


async def test_tokens_of_a_response_have_other_names(server: Wayward) -> None:
    usage_of_a_response = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    server.does(say({"id": "resp_1", "output": [], "usage": usage_of_a_response}))
    ((_, usage),) = await ask(server.url, work("a"))
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (3, 2)


async def test_a_refusal_for_now_is_asked_again(server: Wayward) -> None:
    server.does(BUSY, BUSY, say(ANSWER), status(503), say(ANSWER))
    results = await ask(server.url, work("a", "b"))
    assert shown(results) == [("a", 200), ("b", 200)]
    assert len(server.seen) == 5


async def test_a_refusal_is_told_in_openais_shape(server: Wayward) -> None:
    server.does(refuse(400, "too hot", "BadRequestError", "temperature"), status(404, "what?"))
    results = await ask(server.url, work("a", "b"))
    bodies = [msgspec.json.decode(r.response.body) for r, _ in results if r.response is not None]
    error = {"message": "too hot", "type": "BadRequestError", "param": "temperature", "code": 400}
    assert bodies[0] == {"error": error}
    assert bodies[1]["error"]["message"] == "what?"
    assert shown(results) == [("a", 400), ("b", 404)]


async def test_one_that_fails_does_not_end_the_others(server: Wayward) -> None:
    server.does(BUSY, status(200, "<html>"), hang, say(ANSWER))
    results = await ask(server.url, work("a", "b", "c", "d"), max_retries=0, timeout_s=0.2)
    assert shown(results) == [("a", 429), ("b", "unexpected_answer"), ("c", "timeout"), ("d", 200)]


async def test_a_connection_that_breaks_where_the_server_lives_is_a_failure(
    server: Wayward,
) -> None:
    server.does(reset, status(200), say(ANSWER))
    results = await ask(server.url, work("a", "b"), max_retries=0)
    assert shown(results) == [("a", "connection_failed"), ("b", 200)]
    assert server.seen[1].path == "/health"


async def test_a_server_that_is_gone_leaves_the_rest_open(server: Wayward) -> None:
    # aiohttp asks twice where asking has no effect.
    server.does(reset, reset, reset)
    with pytest.raises(ServerGone, match="the connection to http://.* broke"):
        await ask(server.url, work("a", "b", "c"), max_retries=0)
    assert [seen.path for seen in server.seen] == ["/v1/completions", "/health", "/health"]


async def test_no_more_at_once_than_allowed_and_all_are_let_go_with_the_batch(
    server: Wayward,
) -> None:
    server.does(hang, hang, hang)
    asking = asyncio.create_task(ask(server.url, work(*"abcdef"), max_concurrency=3))
    seen = [await server.arrived.get() for _ in range(3)]
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    for one in seen:
        await one.left.wait()
    assert len(server.seen) == 3


async def test_a_result_that_cannot_be_written_ends_the_batch(server: Wayward) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    server.does(say(ANSWER))
    async with AsyncClient(server.url) as client:
        with pytest.raises(OSError, match="No space left"):
            await Asker(client, full).ask_all(work("a", "b"), 1)
