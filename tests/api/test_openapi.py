"""`/openapi.json` says what the server does: its routes, its answers, its bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.api.canned import VOCAB_SIZE, CannedService, say, token
from tests.api.conftest import OPTIONS, Server
from tests.api.described import Document
from tinfer.api import fields
from tinfer.api.fields import REFUSED
from tinfer.api.keys import ApiKeys
from tinfer.api.openapi import document
from tinfer.api.server import ENDPOINTS, create_app
from tinfer.api.trace import Trace
from tinfer.core.types import Role
from tinfer.errors import EngineFailed, NoWorker, Overloaded

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
RESPONSES = "/v1/responses"
DOCUMENT = Document(document(ENDPOINTS, "1.2.3"))
USER = {"messages": [{"role": "user", "content": "hi"}]}
TRACE = Trace(
    request_id="r",
    route="whole",
    prefill_worker="w",
    decode_worker=None,
    prompt_tokens=1,
    cached_tokens=0,
    output_tokens=1,
    queue_s=0.5,
    prefill_s=0.5,
    ttft_s=1.0,
    handoff_s=None,
    copy_s=None,
    handoff_bytes=None,
    recomputed=False,
    decode_s=0.0,
    tpot_s=None,
    restarts=0,
    e2el_s=1.0,
)


async def fetched(server: Server) -> Document:
    async with server.session.get(server.url + "/openapi.json") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        return Document(await response.json())


async def ask(server: Server, method: str, path: str, at: str = "", **sent: Any) -> int:
    """Send one request; its answer has to be as described. Returns the status."""
    url = server.url + (at or path)
    async with server.session.request(method, url, **sent) as response:
        body = await response.read()
    DOCUMENT.check((method, path), response.status, response.headers, body)
    return response.status


async def test_the_document_is_served_as_it_is_made(server: Server) -> None:
    assert (await fetched(server)).whole == DOCUMENT.whole
    assert DOCUMENT.whole["openapi"] == "3.1.0"
    assert DOCUMENT.whole["info"]["version"] == OPTIONS.version


class NoRenderer:
    """An application that is not run needs none."""

    def close(self) -> None:
        """Nothing is open."""


def test_it_has_the_routes_of_the_application_and_no_others() -> None:
    app = create_app(CannedService(), NoRenderer(), OPTIONS)  # type: ignore[arg-type]
    routed = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
    }
    assert routed == set(DOCUMENT.operations)
    assert len(routed) == len(ENDPOINTS) == len(app.router.routes())


def test_every_endpoint_that_reads_a_body_describes_it() -> None:
    described = {key for key, one in DOCUMENT.operations.items() if "requestBody" in one}
    assert described == {(e.method, e.path) for e in ENDPOINTS if e.takes is not None}


def references(node: object) -> Iterator[str]:
    """Every `$ref` in the document."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for inner in node.values():
            yield from references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from references(inner)


def test_every_schema_is_one_and_every_reference_leads_to_one() -> None:
    for schema in DOCUMENT.schemas.values():
        Draft202012Validator.check_schema(schema)
    named = {reference.removeprefix("#/components/schemas/") for reference in DOCUMENT_REFERENCES}
    assert named <= set(DOCUMENT.schemas)
    unused = set(DOCUMENT.schemas) - named
    assert unused == set()


DOCUMENT_REFERENCES = set(references(DOCUMENT.whole))


def test_every_operation_has_its_own_id_and_says_what_it_is_for() -> None:
    operations = DOCUMENT.operations.values()
    assert len({operation["operationId"] for operation in operations}) == len(ENDPOINTS)
    assert all(operation["summary"] for operation in operations)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
async def test_answers_are_as_described(
    server: Server, path: str, full: bool, stream: bool, n: int
) -> None:
    positions = [token("a", top=2), token("b", top=2)]
    server.service.script = lambda _: say("ab", logprobs=positions, trace=TRACE, stop_reason="c")
    body: dict[str, Any] = USER if path == CHATS else {"prompt": "ab"}
    body = {**body, "stream": stream, "n": n, "surprise": 1}
    headers = {}
    if full:
        headers = {"X-Tinfer-Trace": "1", "X-Request-Id": "mine"}
        body |= {"logprobs": True, "top_logprobs": 2, "return_prompt_text": True}
        if path == COMPLETIONS:
            body = {**body, "logprobs": 2, "echo": True}
            del body["top_logprobs"]
        body["return_token_ids"] = True
        if stream:
            options = {"include_usage": True, "continuous_usage_stats": True}
            body["stream_options"] = options
    if path == COMPLETIONS and full:
        prompt = [None, *(token("p", token_id=112) for _ in "ab")]
        server.service.script = lambda _: [
            *say("ab", logprobs=positions, trace=TRACE, prompt_logprobs=prompt)
        ]
    assert await ask(server, "POST", path, json=body, headers=headers) == 200


@pytest.mark.parametrize("options", [{"enable_prompt_tokens_details": True}], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_with_details_is_as_described(server: Server, stream: bool) -> None:
    body = {**USER, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    assert await ask(server, "POST", CHATS, json=body) == 200


async def test_a_stream_that_fails_is_as_described(server: Server) -> None:
    server.service.script = lambda _: [*say("a", "b")[:1], EngineFailed("the worker broke")]
    body = {**USER, "stream": True}
    assert await ask(server, "POST", CHATS, json=body) == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("full", [False, True])
async def test_responses_are_as_described(server: Server, full: bool, stream: bool) -> None:
    positions = [token("a", top=2), token("b", top=2)]
    server.service.script = lambda _: say("ab", logprobs=positions, trace=TRACE)
    body: dict[str, Any] = {"input": "hi", "stream": stream, "surprise": 1}
    headers = {}
    if full:
        headers = {"X-Tinfer-Trace": "1", "X-Request-Id": "mine"}
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        body |= {"metadata": {"a": "b"}, "tools": [{"type": "function", "name": "f"}]}
        body |= {"tool_choice": "none", "instructions": "Be brief.", "user": "me"}
        body |= {"text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"}}
    assert DOCUMENT.takes("POST", RESPONSES, body)
    assert await ask(server, "POST", RESPONSES, json=body, headers=headers) == 200
    server.service.script = lambda _: say("ab", reason="length", logprobs=positions, trace=TRACE)
    assert await ask(server, "POST", RESPONSES, json=body, headers=headers) == 200


async def test_a_response_that_fails_is_as_described(server: Server) -> None:
    server.service.script = lambda _: [*say("a", "b")[:1], EngineFailed("the worker broke")]
    assert await ask(server, "POST", RESPONSES, json={"input": "hi", "stream": True}) == 200


async def test_responses_of_the_past_are_nowhere(server: Server) -> None:
    path = "/v1/responses/{response_id}"
    for method, action in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        at = f"/v1/responses/resp_1{action}"
        assert await ask(server, method, path + action, at=at) == 404


def test_what_a_response_does_not_take_is_listed() -> None:
    reference = DOCUMENT.body_schema("POST", RESPONSES)["$ref"]
    properties = DOCUMENT.schemas[reference.rpartition("/")[2]]["properties"]
    assert set(fields.RESPONSES.refused) <= set(properties)
    body = {"input": "hi"}
    assert DOCUMENT.takes("POST", RESPONSES, body | {"background": False})
    assert not DOCUMENT.takes("POST", RESPONSES, body | {"background": True})
    assert not DOCUMENT.takes("POST", RESPONSES, body | {"previous_response_id": "resp_1"})


async def test_the_other_endpoints_answer_as_described(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": "ab", "return_token_strs": True}
    assert await ask(server, "POST", "/tokenize", json=asked) == 200
    assert await ask(server, "POST", "/tokenize", json=USER) == 200
    assert await ask(server, "POST", "/detokenize", json={"tokens": [1]}) == 200
    name = "/v1/models/{name}"
    assert await ask(server, "GET", name, at="/v1/models/org/tiny") == 200
    assert await ask(server, "GET", name, at="/v1/models/no") == 404
    silent = {"/v1/models", "/health", "/ping", "/version", "/openapi.json", "/metrics"}
    for path in (*silent, "/debug/ledger", "/debug/state", "/debug/trace"):
        assert await ask(server, "GET", path) == 200
    assert await ask(server, "POST", "/ping") == 200
    server.service.health = (False, "draining")
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        assert await ask(server, method, path) == 503
    wish = {"worker": "decode-0", "role": "prefill"}
    assert await ask(server, "POST", "/debug/role", json=wish) == 400
    taken: list[tuple[str, Role]] = []
    monkeypatch.setattr(server.service, "ask_role", lambda *wished: taken.append(wished))
    assert await ask(server, "POST", "/debug/role", json=wish) == 202
    assert taken == [("decode-0", Role.PREFILL)]


@pytest.mark.parametrize("options", [{"max_body_bytes": 1000}], indirect=True)
async def test_errors_are_as_described(server: Server) -> None:
    for method, path in DOCUMENT.operations:
        if "requestBody" in DOCUMENT.operations[method, path]:
            assert await ask(server, method, path, json={}) == 400
            assert await ask(server, method, path, json={"x": "y" * 1000}) == 413
    for error in (Overloaded("full", 2.5), NoWorker("gone"), EngineFailed("broke"), OSError()):
        server.service.script = lambda _, error=error: raising(error)  # type: ignore[misc]
        status = await ask(server, "POST", COMPLETIONS, json={"prompt": "a"})
        assert status == getattr(error, "http_status", 500)
    other = {"prompt": "a", "model": "other"}
    assert await ask(server, "POST", COMPLETIONS, json=other) == 404
    for method, path, expected in (("PUT", COMPLETIONS, 405), ("GET", "/v2", 404)):
        async with server.session.request(method, server.url + path) as response:
            assert response.status == expected
            DOCUMENT.check(None, expected, response.headers, await response.read())


def raising(error: Exception) -> Any:
    raise error


BOUNDS = [
    (path, name, bound)
    for path in (COMPLETIONS, CHATS, RESPONSES, "/detokenize")
    for name, schema in DOCUMENT.schemas[
        DOCUMENT.body_schema("POST", path)["$ref"].rpartition("/")[2]
    ]["properties"].items()
    for bound in ("minimum", "maximum", "exclusiveMinimum", "minItems", "maxItems", "minLength")
    if bound in schema
]


@pytest.mark.parametrize("options", [{"max_sequences": 16}], indirect=True)
@pytest.mark.parametrize(("path", "name", "bound"), BOUNDS)
async def test_bounds_are_those_of_the_server(
    server: Server, path: str, name: str, bound: str
) -> None:
    """What lies beyond a bound is refused for that field; the bound itself is not, unless this
    server's own limit is lower."""
    schema = DOCUMENT.schemas[DOCUMENT.body_schema("POST", path)["$ref"].rpartition("/")[2]]
    limit = schema["properties"][name][bound]
    step = -1 if bound.startswith("min") else 1
    at, beyond = limit, limit + step
    if bound == "exclusiveMinimum":
        at, beyond = limit + 1, limit
    if bound.endswith("Items"):
        item: Any = USER["messages"][0] if name == "messages" else "s"
        item = 1 if name.endswith("token_ids") else item
        at, beyond = [item] * at, [item] * beyond
    if bound == "minLength":
        at, beyond = "s" * at, "s" * beyond
    bodies: dict[str, dict[str, Any]] = {CHATS: USER, RESPONSES: {"input": "ab"}}
    body = bodies.get(path, {"prompt": "ab"})
    if name == "top_logprobs":
        body = {**body, "logprobs": True}
        if path == RESPONSES:
            body = {"input": "ab", "include": ["message.output_text.logprobs"]}
    if name == "max_tokens" and path == COMPLETIONS:
        body = {**body, "echo": True}  # only a prompt that is repeated may go without an answer
    status, error = await server.refused(path, **{**body, name: beyond})
    assert (status, error["param"]) == (400, name), error
    status, said, _ = await server.post(path, **{**body, name: at})
    assert status == 200 or said["error"]["param"] != name or "at most" in str(said), said


@pytest.mark.parametrize("item", [-1, VOCAB_SIZE])
@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
async def test_token_ids_are_from_zero(server: Server, name: str, item: int) -> None:
    body = {"prompt": "a", name: [item]}
    status, error = await server.refused(COMPLETIONS, **body)
    assert (status, error["param"]) == (400, name)
    assert DOCUMENT.takes("POST", COMPLETIONS, body) == (item >= 0), "the size is the model's"


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", 1], None, [-1], [[1], -1]])
async def test_prompts_that_the_document_forbids_are_refused(server: Server, prompt: Any) -> None:
    assert not DOCUMENT.takes("POST", COMPLETIONS, {"prompt": prompt})
    status, error = await server.refused(COMPLETIONS, prompt=prompt)
    assert status == 400


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
async def test_prompts_that_the_document_allows_are_taken(server: Server, prompt: Any) -> None:
    assert DOCUMENT.takes("POST", COMPLETIONS, {"prompt": prompt})
    assert (await server.complete(prompt=prompt))["choices"]


@pytest.mark.parametrize("tokens", [["1"], [None], [[1]], 1, None])
async def test_items_keep_their_type(server: Server, tokens: Any) -> None:
    assert not DOCUMENT.takes("POST", "/detokenize", {"tokens": tokens})
    status, error = await server.refused("/detokenize", tokens=tokens)
    assert status == 400


def test_what_is_not_supported_takes_its_off_values_only() -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHATS, USER)):
        schema = DOCUMENT.schemas[DOCUMENT.body_schema("POST", path)["$ref"].rpartition("/")[2]]
        assert set(REFUSED) <= set(schema["properties"])
        for off in REFUSED["functions"]:
            assert DOCUMENT.takes("POST", path, {**body, "functions": off})
        assert not DOCUMENT.takes("POST", path, {**body, "functions": [{}]})


@pytest.mark.parametrize("options", [{"api_keys": ApiKeys(["sk-key"])}], indirect=True)
async def test_what_needs_a_key_says_so(server: Server) -> None:
    for (method, path), operation in DOCUMENT.operations.items():
        status = await ask(server, method, path)
        assert (status == 401) == ("security" in operation) == ("401" in operation["responses"])


async def test_what_is_for_this_machine_only_says_so(server: Server) -> None:
    for (method, path), operation in DOCUMENT.operations.items():
        status = await ask(server, method, path, headers={"Via": "1.1 proxy"})
        assert (status == 403) == ("403" in operation["responses"])


async def test_heads_that_are_too_large_are_described(server: Server) -> None:
    for (method, path), operation in DOCUMENT.operations.items():
        assert await ask(server, method, path, headers={"X": "y" * 20_000}) == 431
        assert "431" in operation["responses"]
