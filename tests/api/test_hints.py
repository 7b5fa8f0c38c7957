"""What a client says of its request beside what is to be generated: taken, bounded, and never
silently something else."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.api.canned import say
from tests.api.conftest import Server
from tests.api.test_trace import trace
from tinfer.api.limits import MAX_DEADLINE_MS, MAX_EXPECTED_TOKENS
from tinfer.api.service import Hints
from tinfer.api.trace import Predicted
from tinfer.client.results import Usage

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
PREDICTED = Predicted("online", 40.0, 12.5, 200.0)
SHOWN = {"predictor": "online", "median_tokens": 40.0, "low_tokens": 12.5, "high_tokens": 200.0}


@pytest.fixture(autouse=True)
def predicted(server: Server) -> None:
    said = msgspec.structs.replace(trace(), prediction=PREDICTED)
    server.service.script = lambda index: say("Hel", "lo", trace=said)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("body", "hints"),
    [
        ({}, Hints()),
        ({"tinfer": None, "priority": None}, Hints()),
        ({"tinfer": {}}, Hints()),
        ({"tinfer": {"expected_output_tokens": 7}}, Hints(expected_output_tokens=7)),
        ({"priority": -5}, Hints(priority=-5)),
        ({"tinfer": {"priority": 3}}, Hints(priority=3)),
        ({"tinfer": {"priority": 3}, "priority": 3}, Hints(priority=3)),
        ({"tinfer": {"deadline_ms": 60500}}, Hints(deadline_s=60.5)),
    ],
)
async def test_what_is_said_reaches_every_answer(
    server: Server, path: str, body: dict[str, Any], hints: Hints
) -> None:
    status, said, _ = await server.post(path, **BODIES[path], **body, n=2)
    assert status == 200, said
    assert [one.hints for one in server.service.generations] == [hints, hints]
    assert "tinfer_prediction" not in said["usage"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tinfer": 5}, "tinfer"),
        ({"tinfer": {"expected_tokens": 5}}, "tinfer"),
        ({"tinfer": {"expected_output_tokens": 0}}, "tinfer.expected_output_tokens"),
        ({"tinfer": {"expected_output_tokens": 5.5}}, "tinfer.expected_output_tokens"),
        ({"tinfer": {"expected_output_tokens": "5"}}, "tinfer.expected_output_tokens"),
        (
            {"tinfer": {"expected_output_tokens": MAX_EXPECTED_TOKENS + 1}},
            "tinfer.expected_output_tokens",
        ),
        ({"tinfer": {"deadline_ms": 0}}, "tinfer.deadline_ms"),
        ({"tinfer": {"deadline_ms": MAX_DEADLINE_MS + 1}}, "tinfer.deadline_ms"),
        ({"tinfer": {"priority": "high"}}, "tinfer.priority"),
        ({"tinfer": {"priority": 1}, "priority": 2}, "tinfer.priority"),
        ({"tinfer": {"include_prediction": 1}}, "tinfer.include_prediction"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 1 << 64}, "priority"),
    ],
)
@pytest.mark.parametrize("path", BODIES)
async def test_what_makes_no_sense_is_named(
    server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    status, said, _ = await server.post(path, **BODIES[path], **body)
    assert (status, said["error"]["param"]) == (400, param), said
    assert server.service.generations == []


@pytest.mark.parametrize("path", BODIES)
async def test_a_prediction_is_told_in_the_usage(server: Server, path: str) -> None:
    asked = {"tinfer": {"include_prediction": True}}
    _, said, _ = await server.post(path, **BODIES[path], **asked)
    assert said["usage"]["tinfer_prediction"] == SHOWN
    _, said, _ = await server.post(path, **BODIES[path], **asked, n=2)
    assert said["usage"]["tinfer_prediction"] == {"answers": [SHOWN, SHOWN]}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "asked",
    [
        {"tinfer": {"include_prediction": True}},
        {"stream_options": {"include_prediction": True}},
        {"stream_options": {"include_usage": True}, "tinfer": {"include_prediction": True}},
    ],
)
async def test_in_a_stream_it_comes_with_the_usage(
    server: Server, path: str, asked: dict[str, Any]
) -> None:
    *_, last = await server.stream(path, **BODIES[path], **asked)
    assert (last["choices"], last["usage"]["tinfer_prediction"]) == ([], SHOWN)


async def test_a_service_that_predicts_nothing_tells_nothing(server: Server) -> None:
    server.service.script = lambda index: say("Hello")
    said = await server.complete(tinfer={"include_prediction": True})
    assert "tinfer_prediction" not in said["usage"]


async def test_the_shortest_time_counts(server: Server) -> None:
    for header, field, expected in (("9", 2000, 2.0), ("1.5", 2000, 1.5)):
        body = {"prompt": "a", "tinfer": {"deadline_ms": field}}
        url, headers = f"{server.url}/v1/completions", {"X-Request-Timeout": header}
        async with server.session.post(url, json=body, headers=headers) as response:
            assert response.status == 200
        assert server.service.generations[-1].hints.deadline_s == expected


async def test_an_answer_that_is_late_ends(server: Server) -> None:
    server.service.script = lambda index: [asyncio.Event()]
    status, said, _ = await server.post("/v1/completions", prompt="a", tinfer={"deadline_ms": 20})
    assert (status, said["error"]["message"]) == (504, "the answer was not complete after 0.02 s")


def test_the_client_reads_it() -> None:
    usage = msgspec.convert({"prompt_tokens": 3, "tinfer_prediction": SHOWN}, Usage)
    assert usage.tinfer_prediction is not None
    assert usage.tinfer_prediction.high_tokens == 200.0
