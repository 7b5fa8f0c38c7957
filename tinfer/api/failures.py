"""Errors as clients see them: one JSON shape for every status, and for the last event of a stream.

A `TinferError` speaks for itself; anything unexpected becomes a 500 that carries only an id, under
which the log has the rest.
"""

from __future__ import annotations

import http
import logging
import math

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from tinfer.api.responses import ErrorBody, ErrorInfo, new_id
from tinfer.errors import DeadlinePassed, RequestError, TinferError, TryLater, Unauthorized

log = logging.getLogger(__name__)

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
}


def error_body(error: TinferError) -> ErrorBody:
    """The body for an error that is raised on purpose."""
    param = error.param if isinstance(error, RequestError) else None
    return ErrorBody(ErrorInfo(error.message, error.error_type, param, error.http_status))


def unexpected(error: BaseException) -> ErrorBody:
    """The body for any other error, which is logged here with its traceback."""
    error_id = new_id()
    log.error("request failed unexpectedly", extra={"error_id": error_id}, exc_info=error)
    message = f"internal error, logged as {error_id}"
    return ErrorBody(ErrorInfo(message, "InternalServerError", None, 500))


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """Any body as JSON."""
    return web.Response(
        body=msgspec.json.encode(body),
        status=status,
        headers=headers,
        content_type="application/json",
    )


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns what a handler raises before its first byte into a response."""
    try:
        return await handler(request)
    except TinferError as error:
        return json_response(error_body(error), error.http_status, _headers(error))
    except web.HTTPException as error:
        return _http_error(error)
    except ConnectionResetError:
        raise
    except Exception as error:  # noqa: BLE001 - the last stop: logged, and answered without details
        return json_response(unexpected(error), 500)


def _headers(error: TinferError) -> dict[str, str] | None:
    if isinstance(error, TryLater):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, DeadlinePassed):
        # Source: openai-python, which else sends it again.
        return {"x-should-retry": "false"}
    return None


def _http_error(error: web.HTTPException) -> web.Response:
    """aiohttp's own 404, 405 and 413 in our shape."""
    fallback = "BadRequestError" if error.status < 500 else "InternalServerError"
    kind = _TYPES.get(error.status, fallback)
    body = ErrorBody(ErrorInfo(http.HTTPStatus(error.status).phrase, kind, None, error.status))
    allow = error.headers.get("Allow")
    return json_response(body, error.status, None if allow is None else {"Allow": allow})
