"""`GET /debug/trace`: how far back it looks, whose slices it gives, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.conftest import Server
from tinfer.client import AsyncClient, BadRequest, NotFound

PATH = "/debug/trace"


async def asked(server: Server, query: str) -> tuple[int, Any]:
    async with server.session.get(server.url + PATH + query) as response:
        assert response.content_type == "application/json"
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("query", "wish"),
    [
        ("", (60.0, None)),
        ("?seconds=5.5", (5.5, None)),
        ("?seconds=3600", (3600.0, None)),
        ("?request_id=mine", (3600.0, "mine")),
        ("?request_id=mine&seconds=2", (2.0, "mine")),
        ("?other=1", (60.0, None)),
    ],
)
async def test_what_is_asked_for(
    server: Server, query: str, wish: tuple[float, str | None]
) -> None:
    status, body = await asked(server, query)
    assert (status, server.service.traced) == (200, [wish])
    assert body.keys() == {"displayTimeUnit", "otherData", "traceEvents"}
    assert body["otherData"] == {"server": "tinfer", "version": "1.2.3"}
    assert [event["name"] for event in body["traceEvents"]] == ["one", "one"]


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "nan", "inf", "3600.5", "1,5", "%ff"])
@pytest.mark.parametrize("also", ["", "&request_id=mine"])
async def test_seconds_that_are_none(server: Server, value: str, also: str) -> None:
    status, body = await asked(server, f"?seconds={value}{also}")
    error = body["error"]
    assert (status, error["type"], error["param"]) == (400, "BadRequestError", "seconds")
    assert "above 0 and at most 3600" in error["message"] and server.service.traced == []


async def test_requests_that_are_none(server: Server) -> None:
    status, body = await asked(server, "?request_id=")
    assert (status, body["error"]["param"]) == (400, "request_id")
    status, body = await asked(server, "?request_id=other")
    error = body["error"]
    assert (status, error["type"], error["param"]) == (404, "NotFoundError", "request_id")
    assert error["message"] == "no request 'other' is kept"


async def test_the_client(server: Server) -> None:
    async with AsyncClient(server.url, max_retries=0) as client:
        assert len(json.loads(await client.trace())["traceEvents"]) == 2
        await client.trace("mine", 7)
        assert server.service.traced == [(60.0, None), (7.0, "mine")]
        with pytest.raises(NotFound, match="no request 'a&b c' is kept"):
            await client.trace("a&b c")
        with pytest.raises(BadRequest, match="seconds"):
            await client.trace(seconds=-1)
