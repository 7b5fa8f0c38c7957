"""Sends the requests of a batch, so many at a time, and makes a result of however each one ends."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.batch.lines import ID_PREFIX, BadLine, ErrorCode, Failure, Request, Response, Result
from tinfer.client import (
    ApiError,
    AsyncClient,
    ConnectionFailed,
    RequestTimeout,
    TinferClientError,
    Usage,
)
from tinfer.client.many import each

Work = Iterator[BadLine | Request]
OnResult = Callable[[Result, Usage | None], None]


class ServerGone(Exception):
    """Nothing answers any more: what is left is not asked, and has no result."""


class _Used(Usage):
    """As completions and chats tell it, or as responses do."""

    input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        self.prompt_tokens = self.prompt_tokens or self.input_tokens
        self.completion_tokens = self.completion_tokens or self.output_tokens


class _Body(Struct):
    """What a batch wants to know of an answer."""

    id: str | None = None
    usage: _Used | None = None


class Asker:
    """Gives every line to `on_result` once, with its tokens, in the order in which they end."""

    def __init__(self, client: AsyncClient, on_result: OnResult) -> None:
        self._client = client
        self._on_result = on_result

    async def ask_all(self, work: Work, max_concurrency: int) -> None:
        """Until there is no more work. Raises `ServerGone`, and `OSError` of `on_result`.

        Then, and when it is cancelled, what is under way is cancelled, also on the server.
        """

        async def add_result(line: BadLine | Request) -> None:
            if isinstance(line, BadLine):
                self._on_result(_bad(line), None)
            else:
                self._on_result(*await self._answer(line))

        await each(work, add_result, max_concurrency)

    async def _answer(self, asked: Request) -> tuple[Result, Usage | None]:
        try:
            answer = await self._client.post(asked.url, asked.body)
        except ApiError as error:
            return _refused(asked.custom_id, error), None
        except TinferClientError as error:
            if isinstance(error, ConnectionFailed):
                await self._check_there(error)
            return _failed(asked.custom_id, _code(error), error.message), None
        told = _told(answer.body)
        response = Response(answer.status, answer.request_id or told.id, answer.body)
        return Result(_new_id(), asked.custom_id, response, None), told.usage

    async def _check_there(self, why: TinferClientError) -> None:
        try:
            await self._client.health()
        except TinferClientError:
            raise ServerGone(why.message) from why


def write_bad_lines(work: Work, on_result: OnResult) -> None:
    """Of work that needs no server."""
    for line in work:
        if isinstance(line, BadLine):
            on_result(_bad(line), None)


def _told(body: msgspec.Raw) -> _Body:
    """Nothing of an answer that has these fields in another shape: it is kept as it is."""
    try:
        return msgspec.json.decode(body, type=_Body)
    except msgspec.DecodeError:
        return _Body()


def _refused(custom_id: str, error: ApiError) -> Result:
    told: dict[str, Any] = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    body = msgspec.Raw(msgspec.json.encode({"error": told}))
    return Result(_new_id(), custom_id, Response(error.status, None, body), None)


def _code(error: TinferClientError) -> ErrorCode:
    if isinstance(error, RequestTimeout):
        return "timeout"
    return "connection_failed" if isinstance(error, ConnectionFailed) else "unexpected_answer"


def _bad(line: BadLine) -> Result:
    return _failed(line.custom_id, line.code, line.message, line.line)


def _failed(
    custom_id: str | None, code: ErrorCode, message: str, line: int | None = None
) -> Result:
    return Result(_new_id(), custom_id, None, Failure(code, message, line))


def _new_id() -> str:
    return ID_PREFIX + uuid.uuid4().hex
