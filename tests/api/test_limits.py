"""How much of everything a client may send: at the limit it is taken, beyond it refused by name."""

from __future__ import annotations

import gzip
import json
import logging
import re
from typing import Any

import msgspec
import pytest

from tests.api.conftest import Server
from tinfer.api import limits
from tinfer.api.depth import depth_exceeds
from tinfer.api.schemas import CompletionRequest

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
IDS = list(range(258))


def guided(**kinds: Any) -> dict[str, Any]:
    return {"structured_outputs": kinds}


def schema_of(num_bytes: int) -> dict[str, Any]:
    """A schema of exactly that size as it is sent to a worker."""
    return {"const": "x" * (num_bytes - len('{"const":""}'))}


def formatted(num_bytes: int) -> dict[str, Any]:
    inner = {"name": "s", "schema": schema_of(num_bytes)}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


def nested(depth: int) -> dict[str, Any]:
    """Objects inside each other."""
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


BYTES, REGEX = limits.MAX_GRAMMAR_BYTES, limits.MAX_REGEX_BYTES
OUTPUTS = "structured_outputs"
# What is just taken, what is just too much, and the field that is named.
SIZES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"stop": ["s"] * 4}, {"stop": ["s"] * 5}, "stop"),
    ({"stop": "s" * 1024}, {"stop": "s" * 1025}, "stop"),
    ({"stop": ["s" * 1024]}, {"stop": ["a", "s" * 1025]}, "stop"),
    (
        {"bad_words": [str(i) for i in range(128)]},
        {"bad_words": [str(i) for i in range(129)]},
        "bad_words",
    ),
    ({"bad_words": ["s" * 1024]}, {"bad_words": ["s" * 1025]}, "bad_words"),
    ({"stop_token_ids": IDS}, {"stop_token_ids": list(range(1025))}, "stop_token_ids"),
    ({"allowed_token_ids": IDS}, {"allowed_token_ids": IDS + [0]}, "allowed_token_ids"),
    (
        {"logit_bias": {str(i): 1 for i in IDS}},
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        "logit_bias",
    ),
    ({"logprobs": 20}, {"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 20}, {"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"n": 4}, {"n": limits.MAX_N + 1}, "n"),
    ({"request_id": "r" * 256}, {"request_id": "r" * 257}, "request_id"),
    (guided(json=schema_of(BYTES)), guided(json=schema_of(BYTES + 1)), OUTPUTS),
    (
        guided(json=json.dumps(schema_of(BYTES), separators=(",", ":"))),
        guided(json=json.dumps(schema_of(BYTES + 1), separators=(",", ":"))),
        OUTPUTS,
    ),
    (formatted(BYTES), formatted(BYTES + 1), "response_format"),
    (guided(grammar="g" * BYTES), guided(grammar="g" * (BYTES + 1)), OUTPUTS),
    (guided(regex="é" * (REGEX // 2)), guided(regex="é" * (REGEX // 2) + "e"), OUTPUTS),
    (guided(choice=["c"] * 4096), guided(choice=["c"] * 4097), OUTPUTS),
    (guided(choice=["c" * (BYTES - 5)]), guided(choice=["c" * (BYTES - 4)]), OUTPUTS),
    (
        guided(json_object=True, whitespace_pattern="w" * 256),
        guided(json_object=True, whitespace_pattern="w" * 257),
        OUTPUTS,
    ),
    (guided(json=nested(64)), guided(json=nested(65)), OUTPUTS),
    (
        guided(structural_tag=json.dumps(nested(80))),
        guided(structural_tag=json.dumps(nested(81))),
        OUTPUTS,
    ),
]


@pytest.mark.parametrize(("most", "too_much", "param"), SIZES)
async def test_sizes(
    server: Server, most: dict[str, Any], too_much: dict[str, Any], param: str
) -> None:
    await server.post(COMPLETIONS, prompt="ab", **most)
    num_taken = len(server.service.generations)
    assert num_taken == most.get("n", 1)
    status, error = await server.refused(COMPLETIONS, prompt="ab", **too_much)
    assert (status, error["param"]) == (400, param)
    assert re.search(r"at most|deeper than|in \[1, ", error["message"])
    assert len(error["message"]) < 300
    assert len(server.service.generations) == num_taken


async def test_an_id_in_a_header_is_an_id_too(server: Server) -> None:
    for length, status in ((256, 200), (257, 400)):
        async with server.session.post(
            server.url + COMPLETIONS, json={"prompt": "a"}, headers={"X-Request-Id": "r" * length}
        ) as response:
            assert response.status == status


# --- nesting --------------------------------------------------------------------------------------


def deep(depth: int, opening: bytes = b'{"a":', closing: bytes = b"}") -> bytes:
    return opening * depth + b"1" + closing * depth


# Where a body can hold anything, with the levels above it.
PLACES = [
    (CHATS, b'{"messages":[{"role":"user","content":"hi"}],"chat_template_kwargs":%b}', 1),
    (CHATS, b'{"messages":[{"role":"user","content":[{"type":"text","text":"a","b":%b}]}]}', 4),
    (CHATS, b'{"messages":[{"role":"user","content":"a","tool_calls":[%b]}]}', 4),
    (COMPLETIONS, b'{"prompt":"a","structured_outputs":{"json":%b}}', 2),
    (COMPLETIONS, b'{"prompt":"a","response_format":{"type":"text","more":%b}}', 2),
    (COMPLETIONS, b'{"prompt":"a","response_format":{"type":"structural_tag","more":%b}}', 2),
    ("/tokenize", b'{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function",'
     b'"function":{"name":"f","parameters":%b}}]}', 4),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "num_above"), PLACES)
async def test_nesting_is_refused_whatever_its_depth(
    server: Server, path: str, body: bytes, num_above: int
) -> None:
    """Around Python's own limit too, where one reader gets through and the next one does not."""
    near = range(limits.MAX_JSON_DEPTH - num_above + 1, 1100)
    for depth in (*near[:3], *near[700::7], 100_000):
        status, message = await send(server, path, body % deep(depth))
        assert (status, "nested" in message) == (400, True), (depth, message)


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize", "/detokenize", "/debug/role"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
async def test_unknown_fields_and_prompts_cannot_nest(
    server: Server, path: str, opening: bytes
) -> None:
    closing = b"]" if opening == b"[" else b"}"
    for name in (b"zap", b"prompt", b"tokens", b"logit_bias", b"stop", b"user", b"worker"):
        for depth in (900, 990, 100_000):
            body = b'{"%b":%b}' % (name, deep(depth, opening, closing))
            assert (await send(server, path, body))[0] == 400


async def test_what_is_nested_just_so_is_taken(server: Server) -> None:
    kwargs = nested(limits.MAX_JSON_DEPTH - 1)
    assert (await server.chat(chat_template_kwargs=kwargs))["choices"]
    server.service.model = msgspec.structs.replace(server.service.model, max_model_len=10_000)
    many = [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 100
    assert (await server.chat(messages=many))["choices"]


def test_depth() -> None:
    for depth in (1, 2, 7):
        assert not depth_exceeds(nested(depth), depth)
        assert depth_exceeds(nested(depth), depth - 1)
    assert not depth_exceeds("text", 0)
    decoder = msgspec.json.Decoder(CompletionRequest)
    body = decoder.decode(b'{"prompt":[[1]],"response_format":[[[1]]]}')
    # The body, and what was kept as text; lists of token ids have their type.
    assert not depth_exceeds(body, 4)
    assert depth_exceeds(body, 3)
    assert not depth_exceeds(decoder.decode(b"{}"), 1)


@pytest.mark.parametrize("kind", [b"structural_tag", b"json_schema", b"text"])
async def test_bytes_that_are_no_text_in_a_format(server: Server, kind: bytes) -> None:
    """A format is kept as it was sent, so nobody has read it before."""
    body = b'{"prompt":"a","response_format":{"type":"%b","more":"\xff"}}' % kind
    assert (await send(server, COMPLETIONS, body))[0] == 400


async def send(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """Status and the message of a refusal."""
    headers = {"Content-Type": "application/json", **headers}
    async with server.session.post(server.url + path, data=body, headers=headers) as response:
        said = await response.json()
        return response.status, said["error"]["message"] if "error" in said else ""


# --- bodies and heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_body_bytes": 100_000}], indirect=True)
async def test_a_small_body_that_unpacks_to_a_large_one(server: Server) -> None:
    for num_bytes, status in ((50_000, 400), (100_000_000, 413)):
        packed = gzip.compress(b'{"prompt":"%b"}' % (b"x" * num_bytes))
        assert len(packed) < 100_000
        headers = {"Content-Encoding": "gzip"}
        # 400: it has been read, and is longer than the model.
        assert (await send(server, COMPLETIONS, packed, **headers))[0] == status


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /health HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % ("v" * 8000), 200),
        ("GET /health HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % ("v" * 9000), 431),
        ("GET /health HTTP/1.1\r\nHost: x\r\n%s: v\r\n\r\n" % ("X" * 9000), 431),
        ("GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % ("v" * 9000), 431),
        ("GET /health HTTP/1.1\r\nHost: x\r\n%s\r\n" % ("X: v\r\n" * 120), 200),
        ("GET /health HTTP/1.1\r\nHost: x\r\n%s\r\n" % ("X: v\r\n" * 200), 431),
        ("GET /health HTTP/1.1\r\nHost: x\r\nA B: secret\r\n\r\n", 400),
        ("GET /health HTTP/9.9\r\nHost: x\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01 that is TLS\r\n\r\n", 400),
    ],
)
async def test_heads(
    server: Server, head: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reader, writer = await server.raw(head)
    line = await reader.readline()
    assert int(line.split()[1]) == status
    if status != 200:
        said = (await reader.read()).partition(b"\r\n\r\n")[2]
        error = msgspec.json.decode(said)["error"]
        assert (error["code"], error["param"]) == (status, None)
        assert "vvv" not in error["message"] and "secret" not in error["message"]
    writer.close()
    await writer.wait_closed()
    # What a head holds may be a key.
    assert caplog.text == ""
