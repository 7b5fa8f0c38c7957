"""Everything that the client raises on purpose.

TinferClientError
├── ConnectionFailed        nothing answers there, or the connection broke before a whole answer
├── RequestTimeout          a time limit passed; `limit` says which one
├── ApiError                the server refused: status, message, type, param, code, retry_after_s
│   ├── BadRequest              400, 413, 422: the request has to change
│   ├── Unauthorized            401, 403: an API key is wanted, or another one, or not from here
│   ├── NotFound                404: no such model or path
│   ├── Overloaded              429: come back after `retry_after_s`
│   └── ServerUnavailable       502, 503, 504: no worker, or the server starts or stops
├── StreamBroken            a stream that had begun ended early; `text` is what was read
└── UnexpectedAnswer        an answer that is not of an OpenAI-compatible server

A wrong parameter name is a `TypeError`, a base URL that is none a `ValueError`.
"""

from __future__ import annotations

from typing import Literal

Limit = Literal["connect", "first token", "between tokens", "total"]


class TinferClientError(Exception):
    """Base of all errors below; `message` is one line for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConnectionFailed(TinferClientError):
    """Nothing answers, or the connection broke before the answer was whole.

    `retryable` is true where no byte of an answer has come.
    """

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class RequestTimeout(TinferClientError):
    """The limit named by `limit` passed; in a stream, `text` is what had been read."""

    def __init__(self, limit: Limit, text: str = "") -> None:
        super().__init__(f"timed out: the limit {_WORDS[limit]} has passed")
        self.limit = limit
        self.text = text


class ApiError(TinferClientError):
    """The server answered with an error.

    `type`, `param` and `code` are those of its body, None where it gives none; `retry_after_s` is
    its `Retry-After` in seconds from now.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: int | str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        about = f" (param: {param})" if param else ""
        super().__init__(f"{message}{about} [HTTP {status}]")
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


class BadRequest(ApiError):
    """The request itself is at fault; `param` names the field when one is."""


class Unauthorized(ApiError):
    """The server wants an API key, or another one, or lets nobody in from here (401, 403)."""


class NotFound(ApiError):
    """The server has no such model or path."""


class Overloaded(ApiError):
    """The server refuses more work for now; `retry_after_s` says when to come back."""


class ServerUnavailable(ApiError):
    """Nobody can answer now: no worker lives, or the server (or a proxy's) is down."""


class StreamBroken(TinferClientError):
    """A stream ended before its end mark: the server said why, or the connection broke.

    `text` is what had been read of the first answer; `type` and `code` are those of the server's
    error event, None when the connection just ended.
    """

    def __init__(
        self, message: str, text: str, type: str | None = None, code: int | str | None = None
    ) -> None:
        super().__init__(message)
        self.text = text
        self.type = type
        self.code = code


class UnexpectedAnswer(TinferClientError):
    """What came is no answer of this endpoint: another kind of server, or a broken proxy."""


_WORDS: dict[Limit, str] = {
    "connect": "for connecting",
    "first token": "for the first token",
    "between tokens": "between two tokens",
    "total": "for the whole request",
}
_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    413: BadRequest,
    422: BadRequest,
    429: Overloaded,
    502: ServerUnavailable,
    503: ServerUnavailable,
    504: ServerUnavailable,
}


def error_class(status: int) -> type[ApiError]:
    """The class that stands for an HTTP status."""
    return _BY_STATUS.get(status, ApiError)
