"""The replicas' balancer: each request goes where the fewest tokens are still to come."""

from __future__ import annotations

from types import TracebackType
from typing import Any, cast

import aiohttp
import pytest

from tinfer.bench.compare.balancer import Balancer
from tinfer.bench.outcome import Planned

URLS = ("http://a", "http://b")


class FakeContent:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def readany(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def read(self, num_bytes: int) -> bytes:
        return b"refused"[:num_bytes]


class FakeResponse:
    status, reason = 200, "OK"

    def __init__(self, pieces: list[bytes]) -> None:
        self.content = FakeContent(pieces)

    async def __aenter__(self) -> FakeResponse:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


class Unreachable(FakeResponse):
    async def __aenter__(self) -> FakeResponse:
        raise OSError("nobody there")


class FakeSession:
    """Answers with what the test has prepared, and keeps where each request went."""

    def __init__(self) -> None:
        self.posted: list[str] = []
        self.response = FakeResponse([])

    def post(self, url: str, **options: Any) -> FakeResponse:
        assert options["allow_redirects"] is False
        self.posted.append(url)
        return self.response


def planned(name: str, prompt_tokens: int, output_tokens: int) -> Planned:
    return Planned(
        request_id=name,
        planned_s=0.0,
        body=f"body of {name}".encode(),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


PLAN = [planned("big", 100, 4), planned("small", 5, 2), planned("next", 1, 1)]


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def balancer(session: FakeSession) -> Balancer:
    return Balancer(cast(aiohttp.ClientSession, session), URLS, PLAN)


async def test_work_is_what_is_still_to_be_computed(
    session: FakeSession, balancer: Balancer
) -> None:
    session.response = FakeResponse([b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n", b": note\n\n"])
    async with balancer.post("/go", data=PLAN[0].body, allow_redirects=False) as response:
        assert (response.status, response.reason) == (200, "OK")
        assert balancer.outstanding_tokens == [104, 0]
        seen = []
        while await response.content.readany():
            seen.append(balancer.outstanding_tokens[0])
        # The prompt is done with the first token.
        assert seen == [3, 1, 1]
    assert balancer.outstanding_tokens == [0, 0]
    assert session.posted == ["http://a/go"] and balancer.placed == {"big": 0}


async def test_each_request_goes_to_the_least_loaded(
    session: FakeSession, balancer: Balancer
) -> None:
    one = balancer.post("/go", data=PLAN[0].body, allow_redirects=False)
    two = balancer.post("/go", data=PLAN[1].body, allow_redirects=False)
    three = balancer.post("/go", data=PLAN[2].body, allow_redirects=False)
    # Two requests of few tokens are less work than one of many.
    assert session.posted == ["http://a/go", "http://b/go", "http://b/go"]
    assert balancer.outstanding_tokens == [104, 9]
    for exchange in (one, two, three):
        async with exchange:
            pass
    assert balancer.outstanding_tokens == [0, 0]


async def test_what_is_refused_or_never_arrives_is_no_work(
    session: FakeSession, balancer: Balancer
) -> None:
    async with balancer.post("/go", data=PLAN[0].body, allow_redirects=False) as response:
        assert await response.content.read(3) == b"ref"
    session.response = Unreachable([])
    with pytest.raises(OSError, match="nobody"):
        async with balancer.post("/go", data=PLAN[1].body, allow_redirects=False):
            pass
    assert balancer.outstanding_tokens == [0, 0]


async def test_more_events_than_tokens_do_not_count_below_nothing(
    session: FakeSession, balancer: Balancer
) -> None:
    session.response = FakeResponse([b"data: x\n\n" * 500])
    async with balancer.post("/go", data=PLAN[2].body, allow_redirects=False) as response:
        await response.content.readany()
        assert balancer.outstanding_tokens == [0, 0]
