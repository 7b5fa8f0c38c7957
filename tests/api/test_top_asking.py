"""How `tinfer top` asks a server, and what it makes of one that does not answer as it should."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from tests.api.wayward import Act, Wayward, half, refuse, say, status, wayward
from tinfer.client import AsyncClient, Unauthorized, UnexpectedAnswer
from tinfer.errors import StartError
from tinfer.top.app import Lost, TopOptions, look, once

STATE = {"workers": [], "status": "ok", "requests_by_phase": {"queued": 3}, "new": 1}
METRICS = 'vllm:generation_tokens_total{model_name="m",engine="0"} '
DOWN = refuse(503, "the server is draining", "ServiceUnavailableError", Retry_After="0")


@pytest.fixture
async def server() -> AsyncIterator[Wayward]:
    async with wayward() as made:
        yield made


@pytest.fixture
async def client(server: Wayward) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, "sk-one", max_retries=0) as made:
        yield made


async def test_one_look(server: Wayward, client: AsyncClient) -> None:
    before_s = time.monotonic()
    server.does(say(STATE), say({"pulls": 2, "idle": False}), status(200, METRICS + "7\n"))
    seen = await look(client)
    assert [one.path for one in server.seen] == ["/debug/state", "/debug/ledger", "/metrics"]
    assert {one.headers["Authorization"] for one in server.seen} == {"Bearer sk-one"}
    assert (seen.state.requests_by_phase, seen.accounts.pulls) == ({"queued": 3}, 2)
    assert seen.metrics.total("vllm:generation_tokens_total") == 7
    assert before_s <= seen.at_s <= time.monotonic()


@pytest.mark.parametrize("failure", [half, DOWN, refuse(500, "broken", "Internal")])
@pytest.mark.parametrize("num_good", [0, 1, 2])
async def test_what_may_pass_is_lost(
    server: Wayward, client: AsyncClient, failure: Act, num_good: int
) -> None:
    good = [say(STATE), say({})]
    server.does(*good[:num_good], failure)
    with pytest.raises(Lost) as lost:
        await look(client)
    assert str(lost.value) and "\n" not in str(lost.value)


@pytest.mark.parametrize(
    ("acts", "error", "told"),
    [
        ([refuse(401, "an API key is required", "x")], Unauthorized, "an API key is required"),
        ([refuse(404, "no path", "NotFoundError")], StartError, "is no tinfer server: no path"),
        ([status(200, "<html>")], UnexpectedAnswer, "/debug/state"),
        ([say({"a": 1}), say({}), status(200, "")], StartError, "no tinfer server"),
        ([say(STATE), say({}), status(200, "<html>")], StartError, "no tinfer server"),
    ],
)
async def test_what_will_not_pass_ends_it(
    server: Wayward, client: AsyncClient, acts: list[Act], error: type[Exception], told: str
) -> None:
    server.does(*acts)
    with pytest.raises(error, match=told):
        await look(client)


async def test_two_looks_are_compared(server: Wayward) -> None:
    for number in ("7", "107"):
        server.does(say(STATE), say({}), status(200, f"{METRICS}{number}\n"))
    options = TopOptions(url=server.url, api_key=None, interval_s=0.1, num_waiting=5)
    view = await once(options)
    assert view.interval_s is not None
    assert view.output_tokens_per_s == 100 / view.interval_s
    assert (view.num_waiting, view.waiting) == (3, [])


async def test_a_server_that_goes_between_two_looks(server: Wayward) -> None:
    server.does(say(STATE), say({}), status(200, ""), DOWN)
    options = TopOptions(url=server.url, api_key=None, interval_s=0.1, num_waiting=5)
    with pytest.raises(Lost):
        await once(options)
