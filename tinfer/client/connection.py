"""One request over HTTP: sent, repeated where that is safe, and every failure made one of ours.

A request is sent again only while no byte of its answer has come: where the connection was
refused, or broke before the head of the answer, and where the server itself refused with 429, 502,
503 or 504. A connection that broke may have left a request that ran; generating has no effect but
its cost, so it is sent again, as the `openai` client does.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import aiohttp
import msgspec

from tinfer.client.errors import (
    ApiError,
    ConnectionFailed,
    RequestTimeout,
    TinferClientError,
    UnexpectedAnswer,
    error_class,
)
from tinfer.client.limits import Deadlines, TimeLimits
from tinfer.client.results import ErrorBody, ErrorInfo, JsonAnswer
from tinfer.client.retries import Retries, retry_after_s

# Before the path of the socket of a server that has no address (`tinfer serve --uds`).
UNIX = "unix:"
MAX_ERROR_BYTES = 64 << 10
MAX_SHOWN_CHARS = 300
# How aiohttp says that a connection broke; the last one between the break and its own notice of it.
BROKEN = (aiohttp.ClientError, ConnectionError, RuntimeError)

ResultT = TypeVar("ResultT")


class Connection:
    """A pool of connections to one server, opened at the first request."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        headers: Mapping[str, str],
        limits: TimeLimits,
        retries: Retries,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._uds = base_url.removeprefix(UNIX) if base_url.startswith(UNIX) else None
        # A Unix socket has no name of its own to ask for.
        self._origin = "http://localhost" if self._uds else server_url(base_url)
        self.base_url = base_url if self._uds else self._origin
        self._tls = tls
        self.limits = limits
        self._retries = retries
        self._max_connections = max_connections
        self._headers = {"User-Agent": "tinfer", **headers}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def close(self) -> None:
        """Close every connection; a request that is under way fails with `ConnectionFailed`."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def fetch(
        self, result: type[ResultT], method: str, path: str, body: object, deadlines: Deadlines
    ) -> ResultT:
        """The whole answer of one request. Raises `TinferClientError`."""
        _, said = await self._read(method, path, body, deadlines)
        try:
            return msgspec.json.decode(said, type=result)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnexpectedAnswer(
                f"{self.base_url}{path} answers what is no {result.__name__}: {error}"
            ) from error

    async def fetch_json(
        self, method: str, path: str, body: object, deadlines: Deadlines
    ) -> JsonAnswer:
        """The whole answer of one request, whatever it says. Raises `TinferClientError`."""
        response, said = await self._read(method, path, body, deadlines)
        try:
            said.decode()
            told = msgspec.Raw(msgspec.json.format(said, indent=-1))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnexpectedAnswer(
                f"{self.base_url}{path} answers what is no JSON: {error}"
            ) from error
        return JsonAnswer(response.status, told, response.headers.get("X-Request-Id"))

    async def fetch_text(self, method: str, path: str, deadlines: Deadlines) -> str:
        """The whole answer of one request as text. Raises `TinferClientError`."""
        _, said = await self._read(method, path, None, deadlines)
        try:
            return said.decode()
        except UnicodeDecodeError as error:
            raise UnexpectedAnswer(
                f"{self.base_url}{path} answers what is no text: {error}"
            ) from error

    async def _read(
        self, method: str, path: str, body: object, deadlines: Deadlines
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """A successful answer, closed, and its body."""
        response = await self.open(method, path, body, deadlines)
        try:
            async with deadlines.kept(), self._explained(retryable=False):
                return response, await response.read()
        finally:
            # Of use only where the answer was not read to its end.
            response.close()

    async def open(
        self, method: str, path: str, body: object, deadlines: Deadlines, stream: bool = False
    ) -> aiohttp.ClientResponse:
        """The head of a successful answer, whose body the caller reads; it also closes it.

        Raises `TinferClientError` once the last attempt has failed.
        """
        attempt = 0
        while True:
            try:
                if stream:
                    deadlines.await_first_token()
                async with deadlines.kept():
                    return await self.once(method, path, body)
            except TinferClientError as error:
                delay_s = self._retries.delay_s(attempt, error)
                if delay_s is None or not deadlines.leaves(delay_s):
                    raise
            attempt += 1
            await self._retries.sleep(delay_s)

    async def once(self, method: str, path: str, body: object) -> aiohttp.ClientResponse:
        """One attempt. Raises `ApiError` for a status that is no success, `ConnectionFailed`."""
        data = None if body is None else msgspec.json.encode(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        async with self._explained(retryable=True):
            response = await self._opened().request(
                method, self._origin + path, data=data, headers=headers, allow_redirects=False
            )
        if 200 <= response.status < 300:
            return response
        try:
            raise await _refusal(response)
        finally:
            response.close()

    @asynccontextmanager
    async def _explained(self, retryable: bool) -> AsyncIterator[None]:
        """Errors of aiohttp as ours; `retryable` says whether nothing of an answer has come."""
        try:
            yield
        except aiohttp.ConnectionTimeoutError as error:
            raise RequestTimeout("connect") from error
        except aiohttp.ClientSSLError as error:
            raise ConnectionFailed(f"no TLS with {self.base_url}: {error}") from error
        except aiohttp.ClientConnectorError as error:
            message = f"nothing answers at {self.base_url} ({_reason(error.os_error)})"
            raise ConnectionFailed(message, retryable=True) from error
        except aiohttp.ClientResponseError as error:
            message = f"{self.base_url} does not speak HTTP: {error.message}"
            raise UnexpectedAnswer(message) from error
        except BROKEN as error:
            message = f"the connection to {self.base_url} broke: {error or type(error).__name__}"
            raise ConnectionFailed(message, retryable and not self._closed) from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._closed:
            raise ConnectionFailed("the client is closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._connector(),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_s),
            )
        return self._session

    def _connector(self) -> aiohttp.BaseConnector:
        if self._uds:
            return aiohttp.UnixConnector(self._uds, limit=self._max_connections)
        tls = True if self._tls is None else self._tls
        return aiohttp.TCPConnector(limit=self._max_connections, ssl=tls)


def server_url(base_url: str) -> str:
    """The server's address without `/v1`; `http://` where no scheme is given.

    Raises `ValueError` for what is no HTTP address.
    """
    text = base_url if "://" in base_url else f"http://{base_url}"
    text = text.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or any(c.isspace() for c in text):
        raise ValueError(f"not the address of a server: {base_url!r}")
    return text


def _reason(error: OSError) -> str:
    """In the system's words: asyncio's own name the address, which the message has already."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    told = b""
    try:
        while len(told) < MAX_ERROR_BYTES and (piece := await response.content.readany()):
            told += piece
    except BROKEN:
        pass  # the status alone says enough
    info = _error_info(told)
    if info is None:
        text = " ".join(told.decode(errors="replace").split())[:MAX_SHOWN_CHARS]
        info = ErrorInfo(text or response.reason or "no reason given")
    wait_s = retry_after_s(response.headers.get("Retry-After"), datetime.now(UTC))
    # What the server says would fail again counts like its other faults, which are not sent again.
    is_final = response.headers.get("x-should-retry") == "false"
    return error_class(500 if is_final else response.status)(
        response.status, info.message, info.type, info.param, info.code, wait_s
    )


def _error_info(told: bytes) -> ErrorInfo | None:
    """OpenAI's error object, inside `error` or bare; None for anything else."""
    kinds: tuple[Any, ...] = (ErrorBody, ErrorInfo)
    for kind in kinds:
        try:
            said = msgspec.json.decode(told, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        return said.error if isinstance(said, ErrorBody) else said
    return None


def read_error(data: str) -> ErrorInfo | None:
    """The error that an event of a stream carries, if it carries one."""
    try:
        return msgspec.json.decode(data, type=ErrorBody).error
    except msgspec.DecodeError:
        return None


def now_s() -> float:
    """The running loop's clock, which the limits use too."""
    return asyncio.get_running_loop().time()
