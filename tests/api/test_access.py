"""Who may ask for what: with API keys, and without them."""

from __future__ import annotations

import logging
from typing import Any

import openai
import pytest

from tests.api.conftest import Server
from tinfer.api.keys import ApiKeys
from tinfer.client import AsyncClient, Unauthorized

KEYS = ("sk-first-key", "sk-second-key")
WITH_KEYS = {"api_keys": ApiKeys(KEYS)}
OPEN = ["/health", "/ping", "/version", "/metrics"]
GUARDED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/debug/ledger"),
    ("GET", "/debug/state"),
    ("GET", "/debug/trace"),
    ("POST", "/debug/role"),
    ("GET", "/nothing/here"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/%2fhealth"),
    ("OPTIONS", "/v1/completions"),
]
BAD = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer sk-first",
    "Bearer sk-first-key2",
    "Bearer SK-FIRST-KEY",
    "sk-first-key",
    "Basic sk-first-key",
    "Bearer sk-first-key sk-second-key",
    "Bearer sk-first-keysk-second-key",
    "Bearer \xe9\xff",
]
ROLE = {"worker": "decode-0", "role": "prefill"}


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_all_but_the_open_paths_need_a_key(server: Server, method: str, path: str) -> None:
    async with server.session.request(method, server.url + path) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        error = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("AuthenticationError", 401)
    for key in KEYS:
        shown = {"Authorization": f"Bearer {key}"}
        async with server.session.request(method, server.url + path, headers=shown) as response:
            assert response.status != 401


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
@pytest.mark.parametrize("path", OPEN)
async def test_whether_the_server_lives_is_told_to_all(server: Server, path: str) -> None:
    async with server.session.get(server.url + path) as response:
        assert response.status == 200


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
@pytest.mark.parametrize("shown", BAD)
async def test_what_is_no_key(
    server: Server, shown: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {} if shown is None else {"Authorization": shown}
    async with server.session.get(server.url + "/v1/models", headers=headers) as response:
        assert response.status == 401
        assert "sk-" not in await response.text()
    assert "sk-" not in caplog.text


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_the_scheme_is_read_as_the_standard_says(server: Server, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {KEYS[1]}"}
    async with server.session.get(server.url + "/v1/models", headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
async def test_a_body_is_not_read_for_who_has_no_key(server: Server) -> None:
    """It is refused by its head, so nobody without a key can make the server hold anything."""
    reader, writer = await server.raw(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
async def test_the_clients(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEYS[1]) as good:
        assert (await good.completions.create(model="tiny", prompt="a")).choices[0].text == "Hello"
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="sk-none") as bad:
        with pytest.raises(openai.AuthenticationError) as caught:
            await bad.completions.create(model="tiny", prompt="a")
        assert "API key" in caught.value.message
    async with AsyncClient(server.url, KEYS[0]) as ours:
        assert (await ours.chat("hi")).text == "Hello"
        assert await ours.ledger()
    async with AsyncClient(server.url) as ours:
        with pytest.raises(Unauthorized):
            await ours.chat("hi")


# --- without keys: what looks inside is for this machine ------------------------------------------


async def test_this_machine_may_look_inside(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"[::1]:{port}"):
        assert await privileged(server, {"Host": host}) == (200, "")
    same_page = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert await privileged(server, same_page) == (200, "")


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"X-Forwarded-For": "203.0.113.7"}, "proxy"),
        ({"Forwarded": "for=203.0.113.7"}, "proxy"),
        ({"X-Real-IP": "127.0.0.1"}, "proxy"),
        ({"Via": "1.1 gate"}, "proxy"),
        ({"Host": "rebound.example.org:8000"}, "localhost"),
        ({"Host": "localhost.example.org"}, "localhost"),
        ({"Host": "127.0.0.1.example.org"}, "localhost"),
        ({"Host": "[::1"}, "localhost"),
        ({"Host": ""}, "localhost"),
        ({"Origin": "https://example.org"}, "page"),
        ({"Origin": "null"}, "page"),
        ({"Sec-Fetch-Site": "cross-site"}, "page"),
        ({"Sec-Fetch-Site": "same-site"}, "page"),
    ],
)
async def test_others_may_not(server: Server, headers: dict[str, str], why: str) -> None:
    status, message = await privileged(server, headers)
    assert status == 403
    assert why in message
    # A page can send this without asking first, so the content type protects nothing.
    headers = {"Content-Type": "text/plain", **headers}
    async with server.session.post(
        server.url + "/debug/role", json=ROLE, headers=headers
    ) as response:
        assert response.status == 403


async def privileged(server: Server, headers: dict[str, str]) -> tuple[int, str]:
    """Status of a look inside, and why not."""
    async with server.session.get(server.url + "/debug/state", headers=headers) as response:
        body: dict[str, Any] = await response.json()
        if response.status == 200:
            return 200, ""
        assert body["error"]["type"] == "PermissionDeniedError"
        return response.status, body["error"]["message"]


@pytest.mark.parametrize("peer", ["203.0.113.7", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0"])
async def test_a_peer_from_elsewhere(
    server: Server, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinfer.api.access._peer", lambda request: peer)
    assert (await privileged(server, {}))[0] == 403
    assert (await server.complete())["choices"][0]["text"] == "Hello"


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
async def test_a_peer_on_loopback(
    server: Server, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinfer.api.access._peer", lambda request: peer)
    assert await privileged(server, {}) == (200, "")


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
async def test_with_a_key_one_may_look_from_anywhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinfer.api.access._peer", lambda request: "203.0.113.7")
    shown = {"Authorization": f"Bearer {KEYS[0]}", "Host": "name.example.org", "Via": "1.1 gate"}
    assert await privileged(server, shown) == (200, "")


def test_keys_do_not_show_themselves() -> None:
    assert repr(ApiKeys(KEYS)) == "<2 API keys>"
    assert len(ApiKeys((*KEYS, KEYS[0]))) == 2
    assert not any(key in str(vars(ApiKeys(KEYS))) for key in KEYS)
