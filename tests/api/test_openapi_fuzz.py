"""Whatever is sent, the answer is one that the document describes: no 5xx, no hang, nothing held.

Bodies are drawn from the document's own schemas, whole or with something broken, and as bytes. What
the document forbids is refused. `benchmarks/openapi_fuzz.py` does the same at length with
schemathesis against a running server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.conftest import OPTIONS
from tests.api.described import Document
from tests.api.drawn import ANY_JSON, Drawing, broken
from tests.api.served import served
from tinfer.api.openapi import document
from tinfer.api.server import ENDPOINTS

# A request for more answers would only take longer.
FEW = msgspec.structs.replace(OPTIONS, max_sequences=64)
DOCUMENT = Document(document(ENDPOINTS, OPTIONS.version))
DRAWING = Drawing(DOCUMENT.schemas)
WITH_BODY = [key for key, one in DOCUMENT.operations.items() if "requestBody" in one]
AS_JSON = {"Content-Type": "application/json"}
NUM_EXAMPLES = 60
SMALL: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
}
# Header values that HTTP allows, and a client's library sends; the second half is not UTF-8.
HEADER_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))


def bodies(method: str, path: str) -> st.SearchStrategy[Any]:
    return DRAWING.values(DOCUMENT.body_schema(method, path))


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_bodies_of_the_document(method: str, path: str, model_dir: Path) -> None:
    with served(model_dir, FEW) as server:

        @settings(max_examples=NUM_EXAMPLES)
        @given(bodies(method, path))
        def check(body: Any) -> None:
            assert DOCUMENT.takes(method, path, body), "drawn from the schema itself"
            status = server.ask(method, path, msgspec.json.encode(body), AS_JSON)
            assert status in (200, 202, 400, 404)

        check()


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_broken_bodies(method: str, path: str, model_dir: Path) -> None:
    with served(model_dir, FEW) as server:

        @settings(max_examples=NUM_EXAMPLES)
        @given(broken(bodies(method, path)))
        def check(body: Any) -> None:
            status = server.ask(method, path, msgspec.json.encode(body), AS_JSON)
            assert status in (200, 202, 400, 404)
            if not DOCUMENT.takes(method, path, body):
                assert status in (400, 404), "taken, though the document forbids it"

        check()


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_bytes_as_bodies(method: str, path: str, model_dir: Path) -> None:
    """Random bytes, random JSON, and JSON with some bytes cut out, changed or put in."""
    texts = ANY_JSON.map(msgspec.json.encode) | bodies(method, path).map(msgspec.json.encode)
    cut = st.tuples(texts, st.binary(max_size=3), st.floats(0, 1), st.integers(0, 4)).map(
        lambda drawn: _cut(*drawn)
    )
    with served(model_dir, FEW) as server:

        @settings(max_examples=NUM_EXAMPLES)
        @given(st.binary(max_size=64) | cut)
        def check(body: bytes) -> None:
            assert server.ask(method, path, body, AS_JSON) in (200, 202, 400, 404)

        check()


def _cut(text: bytes, put: bytes, where: float, num_dropped: int) -> bytes:
    at = int(where * len(text))
    return text[:at] + put + text[at + num_dropped :]


@pytest.mark.parametrize("path", SMALL)
def test_headers(path: str, model_dir: Path) -> None:
    body = msgspec.json.encode(SMALL[path])
    with served(model_dir, FEW) as server:

        @settings(max_examples=NUM_EXAMPLES)
        @given(HEADER_TEXT, HEADER_TEXT | st.sampled_from(["0", "1", "true"]), HEADER_TEXT)
        def check(own_id: str, trace: str, kind: str) -> None:
            headers = {"X-Request-Id": own_id, "X-Tinfer-Trace": trace, "Content-Type": kind}
            for sent in (headers, {**headers, **AS_JSON}):
                assert server.ask("POST", path, body, sent) in (
                    200,
                    400,
                )

        check()


def test_names_of_models(model_dir: Path) -> None:
    safe = "%/ABCDEFabcdef0123456789.-_~"
    with served(model_dir, FEW) as server:

        @settings(max_examples=NUM_EXAMPLES)
        @given(st.text(safe, min_size=1))
        def check(name: str) -> None:
            at = "/v1/models/" + name
            assert server.ask("GET", "/v1/models/{name}", None, {}, at) in (200, 404)

        check()
