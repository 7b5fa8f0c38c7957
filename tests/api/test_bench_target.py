"""Finding the server under test: its model, its kind, its vocabulary, or a reason why not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.api.wayward import Wayward, refuse, reset, say, wayward
from tinfer.bench.target import Target, TokenRange, find_target, vocab_size_of
from tinfer.client.errors import ApiError, ConnectionFailed, ServerUnavailable
from tinfer.errors import StartError

MODELS = {
    "data": [
        {"id": "m", "root": "/m", "max_model_len": 64, "owned_by": "tinfer"},
        {"id": "n", "owned_by": "vllm"},
    ]
}


@pytest.fixture
async def server() -> AsyncIterator[Wayward]:
    async with wayward() as made:
        yield made


async def test_the_first_model_is_taken(server: Wayward) -> None:
    server.does(say(MODELS))
    found = await find_target(server.url + "/v1", None, {"X-Mine": "1"}, 0.0)
    assert found == Target(
        base_url=server.url, model="m", max_model_len=64, root="/m", is_tinfer=True
    )
    assert server.seen[0].headers["X-Mine"] == "1"


async def test_a_named_model_is_looked_up(server: Wayward) -> None:
    server.does(say(MODELS), say(MODELS))
    found = await find_target(server.url, "n", {}, 0.0)
    assert (found.model, found.max_model_len, found.is_tinfer) == ("n", None, False)
    with pytest.raises(StartError, match="does not serve x, but m, n"):
        await find_target(server.url, "x", {}, 0.0)


async def test_a_server_without_a_model(server: Wayward) -> None:
    server.does(say({"data": []}))
    with pytest.raises(StartError, match="serves no model"):
        await find_target(server.url, None, {}, 0.0)


async def test_a_server_that_is_not_there_yet_is_asked_again(
    server: Wayward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinfer.bench.target._RETRY_INTERVAL_S", 0.0)
    server.does(reset, refuse(503, "starting", "ServiceUnavailableError"), say(MODELS))
    assert (await find_target(server.url, None, {}, 600.0)).model == "m"


async def test_without_patience_it_is_asked_once(server: Wayward) -> None:
    server.does(refuse(503, "starting", "ServiceUnavailableError"))
    with pytest.raises(ServerUnavailable, match="starting"):
        await find_target(server.url, None, {}, 0.0)
    with pytest.raises(ConnectionFailed):
        await find_target("http://127.0.0.1:9", None, {}, 0.0)


async def test_a_refusal_is_final(server: Wayward) -> None:
    server.does(refuse(401, "no key", "AuthenticationError"))
    with pytest.raises(ApiError, match="no key"):
        await find_target(server.url, None, {}, 600.0)


async def test_what_is_no_address() -> None:
    with pytest.raises(StartError, match="not the address"):
        await find_target("ftp://x", None, {}, 0.0)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"vocab_size": 5000}, (5000, "config.json")),
        ({"text_config": {"vocab_size": 70}}, (70, "config.json")),
        ({"vocab_size": "many"}, (1000, "assumed")),
        (["vocab_size"], (1000, "assumed")),
        (None, (1000, "assumed")),
    ],
)
def test_the_vocabulary_is_the_models_own_where_it_can_be_read(
    tmp_path: Path, config: object, found: tuple[int, str]
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    target = Target(
        base_url="http://x", model="m", max_model_len=None, root=str(tmp_path), is_tinfer=False
    )
    assert vocab_size_of(target) == found
    assert vocab_size_of(msgspec.structs.replace(target, root=None)) == (1000, "assumed")


@pytest.mark.parametrize("size", [2, 3, 10, 99, 512, 151_936])
def test_prompts_keep_off_the_ends_of_the_vocabulary(size: int) -> None:
    ids = TokenRange.within(size)
    assert 0 <= ids.first_id < ids.vocab_size <= size
    assert size < 100 or (ids.first_id >= 1 and ids.vocab_size <= 0.9 * size)
