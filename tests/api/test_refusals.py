"""Requests that must not reach the service: status, shape, and the field at fault."""

from __future__ import annotations

import logging
from typing import Any

import aiohttp
import pytest

from tests.api.conftest import Server, send
from tinfer.api.fields import IGNORED_HEADER

COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
ROLE = "/debug/role"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [258]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 1025}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 1024, "n": 17}, 400, "n"),
        (COMPLETIONS, {"prompt": "x" * 99}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 101}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "model"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, 400, "stream_options"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, 400,
         "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "best_of"),
        (COMPLETIONS, {"prompt": "a", "best_of": True}, 400, "best_of"),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": 0}, 400, "use_beam_search"),
        (CHATS, {}, 400, "messages"),
        (CHATS, {"messages": []}, 400, "messages"),
        (CHATS, {"messages": [{"role": "user", "content": "x" * 99}]}, 400, "messages"),
    ],
)  # fmt: skip
async def test_refused(
    server: Server, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    got, error = await server.refused(path, **body)
    assert (got, error["param"]) == (status, param)
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]
    assert server.service.generations == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ],
)
async def test_refused_chats(server: Server, body: dict[str, Any], param: str) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], **body}
    status, error = await server.refused(CHATS, **chat)
    assert (status, error["param"]) == (400, param)
    assert server.service.generations == []


@pytest.mark.parametrize("options", [{"trust_request_chat_template": True}], indirect=True)
async def test_templates_of_trusted_clients(server: Server) -> None:
    said = await server.chat(chat_template="own", return_prompt_text=True)
    assert said["prompt_text"] == "own"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v2/nothing", 404, "NotFoundError"),
        ("GET", "/v1/models/other", 404, "NotFoundError"),
        ("GET", COMPLETIONS, 405, "MethodNotAllowedError"),
        ("POST", "/health", 405, "MethodNotAllowedError"),
        ("GET", ROLE, 405, "MethodNotAllowedError"),
        ("POST", "/debug/state", 405, "MethodNotAllowedError"),
        ("POST", "/debug/ledger", 405, "MethodNotAllowedError"),
        ("GET", "/debug", 404, "NotFoundError"),
        ("GET", "/debug/state/decode-0", 404, "NotFoundError"),
    ],
)
async def test_wrong_paths(server: Server, method: str, path: str, status: int, kind: str) -> None:
    async with server.session.request(method, server.url + path) as response:
        assert response.status == status
        error = (await response.json())["error"]
        assert (error["type"], error["code"]) == (kind, status)
        assert ("Allow" in response.headers) == (status == 405)


async def test_an_id_that_is_no_text(server: Server) -> None:
    reader, writer = await send(
        server, COMPLETIONS, {"prompt": "a"}, extra=b"X-Request-Id: \x80\r\n"
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    writer.close()
    await writer.wait_closed()
    assert server.service.generations == []


NO_JSON = (b"{", b"", b"\xff", b'{"worker": "\xff"}', b"[" * 50_000)


@pytest.mark.parametrize("path", [COMPLETIONS, ROLE])
@pytest.mark.parametrize("data", NO_JSON)
async def test_bodies_that_are_not_json(server: Server, path: str, data: bytes) -> None:
    async with server.session.post(
        server.url + path, data=data, headers={"Content-Type": "application/json"}
    ) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "worker"),
        ({"role": "decode"}, "worker"),
        ({"worker": "decode-0"}, "role"),
        ({"worker": 0, "role": "decode"}, "worker"),
        ({"worker": None, "role": "decode"}, "worker"),
        ({"worker": "", "role": "decode"}, "worker"),
        ({"worker": "decode-7", "role": "prefill"}, "worker"),
        ({"worker": "decode-0", "role": "king"}, "role"),
        ({"worker": "decode-0", "role": "whole"}, "role"),
        ({"worker": "decode-0", "role": "Prefill"}, "role"),
        ({"worker": "decode-0", "role": 1}, "role"),
        ({"worker": "decode-0", "role": ["prefill"]}, "role"),
        ({"worker": "decode-0", "role": "prefill"}, "role"),
        ({"worker": "decode-0", "role": "prefill", "when": "now"}, "when"),
    ],
)
async def test_refused_roles(server: Server, body: dict[str, Any], param: str) -> None:
    status, error = await server.refused(ROLE, **body)
    assert (status, error["type"], error["param"]) == (400, "BadRequestError", param)


@pytest.mark.parametrize("data", [b"[]", b'"decode-0"', b"null", b"1"])
async def test_wishes_that_are_no_object(server: Server, data: bytes) -> None:
    async with server.session.post(server.url + ROLE, data=data) as response:
        assert response.status == 400
        error = (await response.json())["error"]
        assert error["type"] == "BadRequestError" and "object" in error["message"]


@pytest.mark.parametrize("query", ["?limit=none", "?worker=nobody", "?%ff"])
async def test_the_state_takes_no_query(server: Server, query: str) -> None:
    async with server.session.get(f"{server.url}/debug/state{query}") as response:
        assert (response.status, await response.json()) == (200, {"workers": []})


async def test_other_content_types(server: Server) -> None:
    async with server.session.post(server.url + COMPLETIONS, data=b'{"prompt":"a"}') as response:
        assert response.status == 400


@pytest.mark.parametrize("options", [{"max_body_bytes": 1000}], indirect=True)
async def test_large_bodies(server: Server) -> None:
    for path, field in ((COMPLETIONS, "prompt"), (ROLE, "worker")):
        status, error = await server.refused(path, **{field: "x" * 2000})
        assert (status, error["type"]) == (413, "RequestTooLargeError")


@pytest.mark.parametrize("stream", [False, True])
async def test_ignored_fields_are_named_and_cannot_inject(server: Server, stream: bool) -> None:
    body = {"prompt": "a", "stream": stream, "zap": 1, "x\r\nSet-Cookie: a=b": 1, "user": "u"}
    async with server.session.post(server.url + COMPLETIONS, json=body) as response:
        assert response.status == 200
        assert response.headers[IGNORED_HEADER] == "zap,x??Set-Cookie??a?b"
        assert "Set-Cookie" not in response.headers
        await response.read()


@pytest.mark.parametrize("options", [{"strict_params": True}], indirect=True)
async def test_strict_servers_refuse_unknown_fields(server: Server) -> None:
    status, error = await server.refused(COMPLETIONS, prompt="a", zap=1)
    assert (status, error["param"]) == (400, "zap")


async def test_unexpected_errors_keep_their_details_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(index: int) -> list[Any]:
        raise RuntimeError("secret")

    server.service.script = broken
    status, error = await server.refused(COMPLETIONS, prompt="a prompt to keep")
    assert status == 500 and "secret" not in error["message"]
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.__dict__["error_id"] in error["message"]
    assert record.exc_info is not None
    assert "a prompt to keep" not in caplog.text


async def test_the_connection_survives_a_refusal(server: Server) -> None:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        for body, status in (({}, 400), ({"prompt": "a"}, 200)):
            async with session.post(server.url + COMPLETIONS, json=body) as response:
                assert response.status == status
                await response.read()
