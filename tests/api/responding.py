"""Asks `/v1/responses` of a canned server, and reads what it says."""

from __future__ import annotations

import json
from typing import Any

from tests.api.conftest import Server

PATH = "/v1/responses"
NOW = {"type": "function", "name": "now"}
# Named anew in every response.
IDS = ("id", "call_id")


async def respond(server: Server, **body: Any) -> Any:
    status, said, _ = await server.post(PATH, **{"input": "hi", **body})
    assert status == 200, said
    return said


async def events_of(server: Server, headers: dict[str, str] | None = None, **body: Any) -> Any:
    """The events of a stream, whose names and numbers are checked."""
    body = {"input": "hi", "stream": True, **body}
    async with server.session.post(server.url + PATH, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        text = (await response.read()).decode()
    *blocks, end = text.split("\n\n")
    assert end == "", "no end mark: the last event is one"
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def names(events: list[Any]) -> list[str]:
    """What happened, with repeated deltas as one."""
    shown: list[str] = []
    for event in events:
        name = event["type"].removeprefix("response.")
        if not shown or shown[-1] != name:
            shown.append(name)
    return shown


def nameless(node: Any) -> Any:
    """Without what is named anew each time."""
    if isinstance(node, dict):
        return {key: nameless(value) for key, value in node.items() if key not in IDS}
    return [nameless(one) for one in node] if isinstance(node, list) else node


def joined(events: list[Any], kind: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")
