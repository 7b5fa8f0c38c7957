"""The two file formats, one JSON object per line: requests as they are read, results as written.

Source: OpenAI's batch API reference, "The request input object" and "The request output object".
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from msgspec import Struct

ErrorCode = Literal[
    # Of a line that is no request; it never reaches the server.
    "invalid_json_line",
    "missing_required_parameter",
    "invalid_parameter",
    "duplicate_custom_id",
    "invalid_method",
    "invalid_url",
    "stream_unsupported",
    # Of a request that got no answer of HTTP.
    "timeout",
    "connection_failed",
    "unexpected_answer",
]
# Written first in every result, so that a line cut short is known for one of ours.
ID_PREFIX = "batch_req_"
LINE_PREFIX = f'{{"id":"{ID_PREFIX}'.encode()
# No dots, query or escapes: what is sent is what is written here, below /v1 and nowhere else.
URL = re.compile(r"/v1(/[A-Za-z0-9_-]+)+")
MAX_SHOWN_CHARS = 80


class Request(Struct, frozen=True):
    """A line that can be sent; `line` counts from 1, `body` is a JSON object as it was written."""

    line: int
    custom_id: str
    url: str
    body: msgspec.Raw


class BadLine(Struct, frozen=True):
    """A line that cannot; `custom_id` is None where it has none to tell."""

    line: int
    custom_id: str | None
    code: ErrorCode
    message: str


class Response(Struct, frozen=True):
    """What the server answered: also a refusal, whose `body` is OpenAI's error object."""

    status_code: int
    request_id: str | None
    body: msgspec.Raw


class Failure(Struct, frozen=True):
    """Why there is no response; `line` is that of the input, where the line itself is at fault."""

    code: ErrorCode
    message: str
    line: int | None = None


class Result(Struct, frozen=True):
    """One line of output: `response` or `error`, and the other is null."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Failure | None

    @property
    def is_answer(self) -> bool:
        return self.response is not None and 200 <= self.response.status_code < 300


def request_of(number: int, line: bytes) -> Request | BadLine:
    """What line `number` of the input asks for."""
    custom_id: str | None = None
    try:
        fields = _object(line, "the line")
        custom_id = _text(fields, "custom_id")
        method = _text(fields, "method")
        if method != "POST":
            raise _Wrong("invalid_method", f"method is {_shown(method)}, not POST")
        url = _text(fields, "url")
        if URL.fullmatch(url) is None:
            raise _Wrong("invalid_url", f"url is {_shown(url)}, no path below /v1/")
        body = fields.get("body")
        if body is None:
            raise _Wrong("missing_required_parameter", "there is no body")
        asked = _object(bytes(body), "body", "invalid_parameter")
        if bytes(asked.get("stream", b"")) == b"true":
            raise _Wrong("stream_unsupported", "an answer in a file cannot be streamed")
    except _Wrong as wrong:
        return BadLine(number, custom_id, wrong.code, f"line {number}: {wrong}")
    return Request(number, custom_id, url, body)


class _Wrong(Exception):
    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def _object(
    text: bytes, name: str, code: ErrorCode = "invalid_json_line"
) -> dict[str, msgspec.Raw]:
    """Its fields, undecoded. Raises `_Wrong` for what is no JSON object in UTF-8."""
    try:
        return msgspec.json.decode(text.decode(), type=dict[str, msgspec.Raw])
    except RecursionError as error:
        raise _Wrong(code, f"{name} nests too deeply") from error
    except msgspec.ValidationError as error:
        raise _Wrong(code, f"{name} is no JSON object") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Wrong(code, f"{name} is no JSON: {error}") from error


def _text(fields: dict[str, msgspec.Raw], name: str) -> str:
    if name not in fields:
        raise _Wrong("missing_required_parameter", f"there is no {name}")
    try:
        text = msgspec.json.decode(fields[name], type=str)
    except msgspec.DecodeError as error:
        raise _Wrong("invalid_parameter", f"{name} is no text") from error
    if not text:
        raise _Wrong("invalid_parameter", f"{name} is empty")
    return text


def _shown(text: str) -> str:
    """Quoted, and cut where it is long."""
    return repr(text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "...")
