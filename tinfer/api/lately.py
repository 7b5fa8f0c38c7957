"""`GET /debug/trace`: what the last seconds saw, as a Chrome trace.

A full one has tens of megabytes, so it is made and written in batches, between which streams move.
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from aiohttp import web

from tinfer.api.context import Api
from tinfer.errors import InvalidRequest

DEFAULT_SECONDS = 60.0
# No ring holds more of a busy server; an idle one may ask for what happened an hour ago.
MAX_SECONDS = 3600.0
QUERY = (
    {
        "name": "seconds",
        "in": "query",
        "description": f"How far back to look. Default {DEFAULT_SECONDS:g}, and with a "
        f"`request_id` {MAX_SECONDS:g}.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS},
    },
    {
        "name": "request_id",
        "in": "query",
        "description": "Only this request: its `X-Request-Id`, the `id` of its answer, or the "
        "`request_id` of `X-Tinfer-Trace`.",
        "schema": {"type": "string", "minLength": 1},
    },
)


async def handle(api: Api, request: web.Request) -> web.StreamResponse:
    """Workers as processes, phases of requests as slices, for Perfetto or chrome://tracing."""
    request_id = request.query.get("request_id")
    if request_id == "":
        raise InvalidRequest("must not be empty", param="request_id")
    default = DEFAULT_SECONDS if request_id is None else MAX_SECONDS
    seconds = seconds_of(request.query.get("seconds"), default)
    batches = api.service.trace(seconds, request_id)
    other = msgspec.json.encode({"server": "tinfer", "version": api.options.version})
    response = web.StreamResponse()
    response.content_type = "application/json"
    await response.prepare(request)
    await response.write(b'{"displayTimeUnit":"ms","otherData":%b,"traceEvents":[' % other)
    between = b"\n"
    for batch in batches:
        if batch:
            await response.write(between + b",\n".join(map(msgspec.json.encode, batch)))
            between = b",\n"
        await asyncio.sleep(0)
    await response.write(b"\n]}\n")
    await response.write_eof()
    return response


def seconds_of(text: str | None, default: float) -> float:
    """The value of `seconds`. Raises `InvalidRequest`."""
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SECONDS:
        message = f"must be above 0 and at most {MAX_SECONDS:g}, got {text[:40]!r}"
        raise InvalidRequest(message, param="seconds")
    return seconds
