"""`POST /v1/responses`: OpenAI's Responses API on what answers chats.

A request is read as the chat that gives the same answer. Nothing is stored, so a response cannot be
asked for again, and the paths that would do so say that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from aiohttp import web

from tinfer.api import sampling
from tinfer.api.chat import prepare
from tinfer.api.context import Api
from tinfer.api.responses_api.bodies import begun
from tinfer.api.responses_api.reply import Manner, ResponsesReply
from tinfer.api.responses_api.request import as_chat
from tinfer.api.responses_api.shortening import prepare_newest
from tinfer.api.serving import answer, generations
from tinfer.errors import RequestError, ResponseNotFound

# What a chat calls the fields of a response; those of other names are called the same.
_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format.schema",
}
_MAX_SHOWN_CHARS = 256


async def handle(api: Api, request: web.Request) -> web.StreamResponse:
    """Validate, render, run and answer one request. Nothing of it is stored."""
    parsed, headers = await api.read(request, api.responses)
    asked = as_chat(parsed)
    with _fields_of_responses():
        make = prepare_newest if parsed.truncation == "auto" else prepare
        ready = await make(api, asked)
    job = api.job(request, asked, "resp_", [ready.prompt], ready.num_logprobs)
    manner = Manner(
        parallel=ready.tools.parallel,
        hides_reasoning=parsed.include_reasoning is False,
        counts_reasoning=api.parsers is not None and api.parsers.reasoning,
    )
    reply = ResponsesReply(job, begun(job, parsed, ready.spec), manner, ready.parsing)
    sequences = generations(job, [sampling.children(ready.spec, job.n)])
    return await answer(request, api.service, sequences, reply, bool(parsed.stream), headers)


async def handle_stored(api: Api, request: web.Request) -> web.StreamResponse:
    """Always 404: this server stores no responses."""
    asked = request.match_info["response_id"][:_MAX_SHOWN_CHARS]
    raise ResponseNotFound(
        f"there is no response `{asked}`: this server stores none", param="response_id"
    )


@contextlib.contextmanager
def _fields_of_responses() -> Iterator[None]:
    """Has an error name the field of the response, where it names the chat's."""
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            error.param = _FIELDS.get(error.param, error.param)
        raise
