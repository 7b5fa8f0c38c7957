"""One client's connection: what it may send, how slowly, and what it is told if that is no HTTP.

Nothing of a head that cannot be read is logged or sent back: its headers may hold a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import hdrs, http_exceptions, web
from aiohttp.typedefs import Handler, Middleware

from tinfer.api import limits
from tinfer.api.failures import json_response
from tinfer.api.responses import ErrorBody, ErrorInfo
from tinfer.errors import Overloaded, RequestTooSlow


class Connection(web.RequestHandler):
    """aiohttp's protocol, which says in our shape what is wrong with a request's head."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionResetError):
            # The client has gone amid its answer, which is no error of ours: aiohttp ends the
            # connection on this, and logs nothing.
            raise ConnectionError("the client has gone") from exc
        if status != 400:
            return super().handle_error(request, status, exc, message)
        info = ErrorInfo("this is no HTTP request", "BadRequestError", None, 400)
        if _is_too_large(exc):
            what = f"{limits.MAX_HEADER_BYTES} bytes, or there are more than {limits.MAX_HEADERS}"
            info = ErrorInfo(f"a header has more than {what}", "RequestTooLargeError", None, 431)
        response = json_response(ErrorBody(info), info.code)
        response.force_close()
        return response


def connections(runner: web.AppRunner, keep_alive_s: float) -> Callable[[], Connection]:
    """Makes the protocol of a connection to the application of a runner that is set up.

    A connection without a whole request head for `keep_alive_s` is closed.
    """
    server = runner.server
    assert server is not None
    loop = asyncio.get_running_loop()

    def connect() -> Connection:
        return Connection(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # none, as runners say it too
            keepalive_timeout=keep_alive_s,
            max_line_size=limits.MAX_HEADER_BYTES,
            max_field_size=limits.MAX_HEADER_BYTES,
            max_headers=limits.MAX_HEADERS,
            lingering_time=limits.LINGER_S,
        )

    return connect


def body_middleware(timeout_s: float, max_bytes: int) -> Middleware:
    """Reads the whole body before the handler runs. Raises `RequestTooSlow`, and `Overloaded` where
    all that are being read may come to more than `max_bytes`.

    Only the request has a deadline: an answer may take as long as it takes.
    """
    reading_bytes = 0

    @web.middleware
    async def read(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal reading_bytes
        if request.match_info.http_exception is None and request.can_read_body:
            most_bytes = _most_bytes(request)
            if reading_bytes and reading_bytes + most_bytes > max_bytes:
                raise Overloaded("too many large requests are arriving")
            reading_bytes += most_bytes
            try:
                async with asyncio.timeout(timeout_s):
                    await request.read()
            except TimeoutError as error:
                message = f"the body of the request did not come within {timeout_s:g} s"
                raise RequestTooSlow(message) from error
            finally:
                reading_bytes -= most_bytes
        return await handler(request)

    return read


def _most_bytes(request: web.Request) -> int:
    """How large its body may become: what it says, if that is what will be in memory."""
    is_plain = request.content_length is not None and hdrs.CONTENT_ENCODING not in request.headers
    most = request.client_max_size
    return min(most, request.content_length or 0) if is_plain else most


def _is_too_large(error: BaseException | None) -> bool:
    if isinstance(error, http_exceptions.LineTooLong):
        return True
    # aiohttp has no class of its own for this one.
    return isinstance(error, http_exceptions.BadHttpMessage) and "Too many" in error.message
