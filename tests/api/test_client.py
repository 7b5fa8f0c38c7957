"""`AsyncClient` and whole answers, against a server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tests.api.wayward import Wayward, half, hang, refuse, reset, say, status, stream, wayward
from tinfer.client import (
    ApiError,
    AsyncClient,
    BadRequest,
    Completion,
    ConnectionFailed,
    NotFound,
    Overloaded,
    RequestTimeout,
    TinferClientError,
    UnexpectedAnswer,
)
from tinfer.client.connection import Connection
from tinfer.client.limits import Deadlines, TimeLimits
from tinfer.client.retries import Retries

GOOD = {"id": "c", "model": "m", "choices": [{"index": 0, "text": "Hello"}]}
SOON_S = 0.25


@pytest.fixture
async def server() -> AsyncIterator[Wayward]:
    async with wayward() as made:
        yield made


@pytest.fixture
async def client(server: Wayward) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, backoff_s=0.0) as made:
        yield made


async def test_what_is_sent(server: Wayward) -> None:
    server.does(say(GOOD), say({"choices": [{"message": {"content": "Hi"}}]}))
    headers = {"X-Request-Id": "r"}
    async with AsyncClient(server.url + "/v1", "secret", headers=headers) as client:
        await client.completions("a", max_tokens=3, seed=None, extra={"later": 1})
        chat = await client.chat("hi", temperature=0)
    assert chat.text == "Hi"
    first, second = server.seen
    assert (first.method, first.path) == ("POST", "/v1/completions")
    assert first.body == {"prompt": "a", "max_tokens": 3, "later": 1}
    assert first.headers["Authorization"] == "Bearer secret"
    assert first.headers["Content-Type"] == "application/json"
    assert first.headers["X-Request-Id"] == "r"
    assert second.path == "/v1/chat/completions"
    assert second.body == {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    assert first.connection is second.connection, "one connection serves one request after another"


@pytest.mark.parametrize(
    "failure",
    [
        reset,
        status(502, "Bad Gateway"),
        refuse(503, "no worker", "ServiceUnavailableError"),
        status(504),
        refuse(429, "full", "TooManyRequestsError", Retry_After="0"),
    ],
    ids=["reset", "502", "503", "504", "429"],
)
async def test_an_attempt_without_an_answer_is_repeated(
    server: Wayward, client: AsyncClient, failure: Any
) -> None:
    server.does(failure, failure, say(GOOD))
    assert (await client.completions("a")).text == "Hello"
    assert [seen.body for seen in server.seen] == [{"prompt": "a"}] * 3


async def test_any_endpoint(server: Wayward, client: AsyncClient) -> None:
    server.does(reset, status(201, '{ "a": 1.50,\n "b": [] }', X_Request_Id="r"), say({}))
    found = await client.post("/v1/later", msgspec.Raw(b'{"big": 1.0}'))
    assert (found.status, bytes(found.body), found.request_id) == (201, b'{"a":1.50,"b":[]}', "r")
    assert server.seen[1].path == "/v1/later" and server.seen[1].body == {"big": 1.0}
    assert (await client.post("/v1/later", {"x": 1})).request_id is None


async def test_metrics_are_text(server: Wayward, client: AsyncClient) -> None:
    server.does(reset, status(200, "a 1\n"), stream(b"\xff"))
    assert await client.metrics() == "a 1\n"
    assert [(seen.method, seen.path) for seen in server.seen[1:]] == [("GET", "/metrics")]
    with pytest.raises(UnexpectedAnswer, match="/metrics answers what is no text"):
        await client.metrics()


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (refuse(404, "no path", "NotFoundError"), NotFound),
        (status(200, "<html>"), UnexpectedAnswer),
        (status(200, '{"a":1}x'), UnexpectedAnswer),
        (half, ConnectionFailed),
    ],
    ids=["404", "HTML", "more than JSON", "half"],
)
async def test_any_endpoint_that_fails(
    server: Wayward, client: AsyncClient, failure: Any, kind: type[TinferClientError]
) -> None:
    server.does(failure)
    with pytest.raises(kind):
        await client.post("/v1/later", {})


async def test_attempts_are_bounded(server: Wayward, client: AsyncClient) -> None:
    server.does(reset, refuse(503, "no worker", "ServiceUnavailableError"), reset)
    with pytest.raises(ConnectionFailed, match="broke"):
        await client.completions("a")
    server.does(*[refuse(429, "full", "TooManyRequestsError", Retry_After="0")] * 3)
    with pytest.raises(Overloaded) as overloaded:
        await client.completions("a")
    assert overloaded.value.retry_after_s == 0.0


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (refuse(500, "worker lost", "InternalServerError"), ApiError),
        (refuse(400, "bad", "BadRequestError"), BadRequest),
        (refuse(404, "no model", "NotFoundError"), NotFound),
        (half, ConnectionFailed),
        (say({"hello": "world"}), UnexpectedAnswer),
        (say({"choices": [{"text": 7}]}), UnexpectedAnswer),
        (status(200, "<html>"), UnexpectedAnswer),
        (status(307, Location="/elsewhere"), ApiError),
    ],
    ids=["500", "400", "404", "half", "other JSON", "other type", "HTML", "redirect"],
)
async def test_the_rest_is_not_repeated(
    server: Wayward, client: AsyncClient, failure: Any, kind: type[TinferClientError]
) -> None:
    server.does(failure)
    with pytest.raises(kind) as raised:
        await client.completions("a")
    assert type(raised.value) is kind
    assert len(server.seen) == 1
    server.does(say(GOOD))
    assert (await client.completions("a")).text == "Hello", "the client goes on"


async def test_errors_carry_what_the_server_says(server: Wayward, client: AsyncClient) -> None:
    server.does(refuse(400, "is too hot", "BadRequestError", "temperature"))
    with pytest.raises(BadRequest) as bad:
        await client.chat("a", temperature=9.0)
    error = bad.value
    assert (error.status, error.message, error.type) == (400, "is too hot", "BadRequestError")
    assert (error.param, error.code, error.retry_after_s) == ("temperature", 400, None)
    assert str(error) == "is too hot (param: temperature) [HTTP 400]"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (say({"message": "bare", "type": "t"}, 400), "bare"),
        (status(400, "plain\n  text"), "plain text"),
        (status(400), "Bad Request"),
        (status(400, "\u00e9" * 70000), "\u00e9" * 300),
        (say({"error": "a string"}, 400), '{"error": "a string"}'),
    ],
    ids=["bare object", "text", "nothing", "long", "error is no object"],
)
async def test_errors_in_other_shapes(
    server: Wayward, client: AsyncClient, act: Any, message: str
) -> None:
    server.does(act)
    with pytest.raises(BadRequest) as bad:
        await client.completions("a")
    assert bad.value.message == message


async def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with AsyncClient(url, backoff_s=0.0) as client:
            with pytest.raises(ConnectionFailed) as refused:
                await client.completions("a")
            with pytest.raises(ConnectionFailed, match="nothing answers at"):
                await client.health()
    assert refused.value.message == f"nothing answers at {url} (Connection refused)"


async def test_something_else_listens() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail ready\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        async with AsyncClient(f"http://127.0.0.1:{port}") as client:
            with pytest.raises(UnexpectedAnswer, match="does not speak HTTP"):
                await client.completions("a")


async def test_a_connection_that_is_never_accepted() -> None:
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        # With its queue full, Linux lets further connections wait.
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        async with AsyncClient(url, connect_timeout_s=SOON_S, max_retries=0) as client:
            with pytest.raises(RequestTimeout) as late:
                await client.completions("a")
    assert late.value.limit == "connect"


async def test_the_total_limit_hangs_up(server: Wayward) -> None:
    server.does(hang, hang)
    async with AsyncClient(server.url, timeout_s=SOON_S) as client:
        with pytest.raises(RequestTimeout) as late:
            await client.completions("a")
        assert late.value.limit == "total"
        await server.seen[0].left.wait()
        # A call's own limit.
        server.does(say(GOOD))
        task = asyncio.create_task(client.completions("a", timeout_s=None))
        await server.arrived.get()
        await server.arrived.get()
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.seen[1].left.wait()
        assert (await client.completions("a", timeout_s=60.0)).text == "Hello"


class Slept:
    """A sleep that takes no time, and remembers."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def connection(server: Wayward, sleep: Slept, **limits: float | None) -> Connection:
    retries = Retries(rng=random.Random(3), sleep=sleep)
    return Connection(server.url, None, {}, TimeLimits(**limits), retries, 10)


async def fetch(made: Connection) -> str:
    try:
        asked = {"prompt": "a"}
        deadlines = Deadlines(made.limits)
        return (await made.fetch(Completion, "POST", "/v1/completions", asked, deadlines)).text
    finally:
        await made.close()


async def test_retry_after_is_waited_for(server: Wayward) -> None:
    server.does(
        refuse(429, "full", "TooManyRequestsError", Retry_After="7"),
        refuse(503, "starting", "ServiceUnavailableError", Retry_After="40"),
        say(GOOD),
    )
    slept = Slept()
    assert await fetch(connection(server, slept)) == "Hello"
    assert len(slept.seconds) == 2
    assert 7 <= slept.seconds[0] <= 7.7 and 40 <= slept.seconds[1] <= 44


async def test_waits_without_retry_after_grow(server: Wayward) -> None:
    server.does(reset, reset, say(GOOD))
    slept = Slept()
    assert await fetch(connection(server, slept)) == "Hello"
    assert 0.25 <= slept.seconds[0] <= 0.5 <= slept.seconds[1] <= 1.0


@pytest.mark.parametrize(
    ("header", "limits"),
    [("121", {"total_s": None}), ("20", {"total_s": 10.0})],
    ids=["too far", "beyond the total limit"],
)
async def test_a_wait_that_leads_nowhere_is_not_begun(
    server: Wayward, header: str, limits: dict[str, float | None]
) -> None:
    server.does(refuse(429, "full", "TooManyRequestsError", Retry_After=header))
    slept = Slept()
    with pytest.raises(Overloaded) as overloaded:
        await fetch(connection(server, slept, **limits))
    assert overloaded.value.retry_after_s == float(header)
    assert slept.seconds == []


async def test_health(server: Wayward, client: AsyncClient) -> None:
    server.does(status(200), status(503, "the server is stopping"), hang)
    assert (await client.health()).ok
    health = await client.health()
    assert (health.ok, health.reason) == (False, "the server is stopping")
    assert len(server.seen) == 2, "a server that says no is not asked again"
    async with AsyncClient(server.url, timeout_s=SOON_S) as hasty:
        with pytest.raises(RequestTimeout):
            await hasty.health()


async def test_the_other_endpoints(server: Wayward, client: AsyncClient) -> None:
    tokens = {"count": 2, "max_model_len": 99, "tokens": [1, 2], "token_strs": None}
    server.does(
        say({"object": "list", "data": [{"id": "m", "max_model_len": 99, "permission": []}]}),
        say(tokens),
        say(tokens),
        say({"prompt": "ab"}),
        say({"idle": True, "leases": 0}),
    )
    assert [(m.id, m.max_model_len) for m in await client.models()] == [("m", 99)]
    said = await client.tokenize("ab", add_special_tokens=False)
    assert (said.tokens, said.count, said.max_model_len, said.token_strs) == ([1, 2], 2, 99, None)
    messages = [{"role": "user", "content": "a"}]
    await client.tokenize(messages, add_generation_prompt=True, return_token_strs=True)
    assert await client.detokenize([1, 2]) == "ab"
    assert (await client.ledger())["idle"] is True
    assert [(seen.method, seen.path, seen.body) for seen in server.seen] == [
        ("GET", "/v1/models", None),
        ("POST", "/tokenize", {"prompt": "ab", "add_special_tokens": False}),
        (
            "POST",
            "/tokenize",
            {"messages": messages, "add_generation_prompt": True, "return_token_strs": True},
        ),
        ("POST", "/detokenize", {"tokens": [1, 2]}),
        ("GET", "/debug/ledger", None),
    ]


async def test_closing_ends_what_is_under_way(server: Wayward) -> None:
    server.does(hang)
    client = AsyncClient(server.url)
    task = asyncio.create_task(client.completions("a"))
    seen = await server.arrived.get()
    await client.close()
    with pytest.raises(ConnectionFailed):
        await task
    await seen.left.wait()
    with pytest.raises(ConnectionFailed, match="the client is closed"):
        await client.completions("a")
    await client.close()
