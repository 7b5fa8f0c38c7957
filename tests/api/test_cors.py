"""Which web pages may ask: what a browser is told, before and with an answer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Server
from tinfer.api.cors import Cors
from tinfer.api.keys import ApiKeys
from tinfer.errors import Overloaded, StartError

PAGE, OTHER = "https://chat.example.org", "https://evil.example.org"
PATH = "/v1/chat/completions"
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a,x-b"}
ONE = {"cors": Cors(origins=(PAGE, "http://localhost:3000"))}
ALL = {"cors": Cors(origins=("*",))}
NARROW = {"cors": Cors(origins=(PAGE,), methods=("POST",), headers=("X-A",), credentials=True)}
WITH_KEYS = {**ONE, "api_keys": ApiKeys(["sk-key"])}


def allowed(headers: Any) -> dict[str, str]:
    """What the headers of an answer say to a browser."""
    start = "access-control-"
    lower = {name.lower(): value for name, value in headers.items()}
    return {name.removeprefix(start): v for name, v in lower.items() if name.startswith(start)}


async def preflight(server: Server, origin: str | None) -> tuple[int, dict[str, str]]:
    headers = ASKS if origin is None else {**ASKS, "Origin": origin}
    async with server.session.options(server.url + PATH, headers=headers) as response:
        return response.status, allowed(response.headers)


async def ask(server: Server, origin: str | None, **body: Any) -> tuple[int, Any, dict[str, str]]:
    """Status, headers, and what they allow, of an answer to a page."""
    chat = {"messages": [{"role": "user", "content": "hi"}], **body}
    headers = {} if origin is None else {"Origin": origin}
    async with server.session.post(server.url + PATH, json=chat, headers=headers) as response:
        await response.read()
        return response.status, response.headers, allowed(response.headers)


@pytest.mark.parametrize("origin", [PAGE, None])
async def test_no_page_may_ask_unless_the_server_is_told(
    server: Server, origin: str | None
) -> None:
    assert await preflight(server, origin) == (405, {})
    status, headers, said = await ask(server, origin)
    assert (status, said) == (200, {})
    assert "Vary" not in headers


@pytest.mark.parametrize("options", [ONE], indirect=True)
async def test_a_page_that_may(server: Server) -> None:
    status, said = await preflight(server, PAGE)
    assert status == 204
    assert said == {
        "allow-origin": PAGE,
        "allow-methods": "GET, POST",
        "allow-headers": "x-a,x-b",
        "max-age": "600",
    }
    status, headers, said = await ask(server, PAGE)
    assert (status, said, headers["Vary"]) == (200, {"allow-origin": PAGE}, "Origin")


@pytest.mark.parametrize("options", [ONE], indirect=True)
@pytest.mark.parametrize(
    "origin",
    [OTHER, "null", "", PAGE + ".evil.org", PAGE.upper(), "http://chat.example.org", None],
)
async def test_a_page_that_may_not(server: Server, origin: str | None) -> None:
    assert await preflight(server, origin) == (403, {})
    status, headers, said = await ask(server, origin)
    # The browser keeps the answer from the page; others than pages are not kept from anything.
    assert (status, said, headers["Vary"]) == (200, {}, "Origin")


@pytest.mark.parametrize("options", [ALL], indirect=True)
async def test_all_pages(server: Server) -> None:
    assert (await preflight(server, OTHER))[1]["allow-origin"] == "*"
    status, headers, said = await ask(server, OTHER)
    assert (status, said) == (200, {"allow-origin": "*"})
    assert "Vary" not in headers


@pytest.mark.parametrize("options", [NARROW], indirect=True)
async def test_named_methods_headers_and_credentials(server: Server) -> None:
    _, said = await preflight(server, PAGE)
    assert said == {
        "allow-origin": PAGE,
        "allow-methods": "POST",
        "allow-headers": "X-A",
        "allow-credentials": "true",
        "max-age": "600",
    }


@pytest.mark.parametrize("options", [ONE], indirect=True)
async def test_streams_and_refusals_carry_the_headers(server: Server) -> None:
    status, headers, said = await ask(server, PAGE, stream=True)
    assert headers["Content-Type"].startswith("text/event-stream")
    assert (status, said) == (200, {"allow-origin": PAGE})
    assert (await ask(server, PAGE, temperature=9))[::2] == (400, {"allow-origin": PAGE})
    server.service.script = lambda index: Overloaded("full")
    assert (await ask(server, PAGE))[::2] == (429, {"allow-origin": PAGE})


@pytest.mark.parametrize("options", [WITH_KEYS], indirect=True)
async def test_a_browser_asks_without_a_key_and_is_told_that_one_is_needed(server: Server) -> None:
    assert (await preflight(server, PAGE))[0] == 204
    status, _, said = await ask(server, PAGE)
    assert (status, said) == (401, {"allow-origin": PAGE})
    # What is not the question of a browser gets nowhere without one.
    async with server.session.options(server.url + PATH) as response:
        assert response.status == 401


@pytest.mark.parametrize(
    "cors",
    [
        Cors(origins=("chat.example.org",)),
        Cors(origins=("https://chat.example.org/",)),
        Cors(origins=("https://chat.example.org/path",)),
        Cors(origins=("https://a b",)),
        Cors(origins=("",)),
        Cors(origins=("null",)),
        Cors(origins=("https://*.example.org",), credentials=True),
        Cors(origins=("*",), credentials=True),
    ],
)
def test_origins_that_no_browser_sends_or_that_let_everyone_in(cors: Cors) -> None:
    with pytest.raises(StartError, match="--allow"):
        cors.check()


def test_origins_as_browsers_send_them() -> None:
    Cors(origins=("*",)).check()
    Cors(origins=("http://localhost:3000", "https://[::1]:8000", "app://obsidian.md")).check()
