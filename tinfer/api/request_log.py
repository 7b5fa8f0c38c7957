"""The id that comes back with every answer, and one line of the log per request.

`X-Request-Id` is the client's own where it sends one, or `request_id` of the body, or one of ours;
the answer's `id` ends with it, and the line has it, so that a client's complaint finds its line.
Prompts and answers are in no line.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from tinfer.api.access import OPEN
from tinfer.api.limits import MAX_REQUEST_ID_CHARS
from tinfer.api.responses import new_id
from tinfer.api.serving import REPLY, Reply

log = logging.getLogger("tinfer.access")

ID_HEADER = "X-Request-Id"
# What a header can carry back unchanged, whoever sends it.
_PLAIN = re.compile(rf"[!-~](?:[ -~]{{0,{MAX_REQUEST_ID_CHARS - 2}}}[!-~])?")
_OWN_ID = web.RequestKey("own_id", str)
# Of an answer whose client was gone before it was over, as nginx has it.
LEFT = 499


def note_id(request: web.Request, own_id: str) -> None:
    """The id under which the request runs. One that no header can carry does not come back."""
    request[_OWN_ID] = own_id if _PLAIN.fullmatch(own_id) else ""


def id_of(request: web.Request) -> str:
    """The id that comes back; empty where the client's own cannot."""
    if _OWN_ID not in request:
        note_id(request, request.headers.get(ID_HEADER) or new_id())
    return request[_OWN_ID]


async def show_id(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: errors and streams carry it too."""
    if own_id := id_of(request):
        response.headers[ID_HEADER] = own_id


@web.middleware
async def log_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """One line per request, when it is over; who watches the server is told of at DEBUG."""
    resource = request.match_info.route.resource
    path = "(no such path)" if resource is None else resource.canonical
    level = logging.DEBUG if path in OPEN else logging.INFO
    if not log.isEnabledFor(level):
        return await handler(request)
    started_s = time.monotonic()
    status = LEFT
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        fields: dict[str, Any] = {"request_id": id_of(request)}
        fields["duration_s"] = round(time.monotonic() - started_s, 6)
        if REPLY in request:
            fields |= _answers(request[REPLY])
        log.log(level, "%s %s %d", request.method, path, status, extra=fields)


def _answers(reply: Reply) -> dict[str, Any]:
    """How the answers were served: figures of one, lists of several."""
    counter, job = reply.counter, reply.job
    traces = [counter.traces.get(index) for index in range(job.num_answers)]
    figures: dict[str, list[Any]] = {
        "route": [trace and trace.route for trace in traces],
        "ttft_s": [trace and trace.ttft_s for trace in traces],
        "finish_reason": [counter.finish_reasons.get(i) for i in range(job.num_answers)],
        "restarts": [trace.restarts if trace else 0 for trace in traces],
    }
    return {
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in job.prompts),
        "cached_tokens": counter.cached_tokens,
        "output_tokens": sum(counter.output_tokens),
        **{name: found[0] if len(found) == 1 else found for name, found in figures.items()},
    }
