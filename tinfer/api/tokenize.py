"""`POST /tokenize` and `POST /detokenize`, as in vLLM: a prompt or a chat as token ids, and back.

Nothing is generated and the model's length is no limit here, so that a client can learn by how much
a prompt is too long. Like prompts of the other endpoints, these run on the renderer's threads.
"""

from __future__ import annotations

import msgspec
from aiohttp import web
from msgspec import Struct

from tinfer.api.chat import chat_options
from tinfer.api.context import Api
from tinfer.api.failures import json_response
from tinfer.api.render import Prompt
from tinfer.api.schemas import TokenizeRequest
from tinfer.api.tools import for_template
from tinfer.errors import InvalidRequest

MAX_TOKEN_ID = 2**32 - 1  # Source: the `tokenizers` library keeps ids as unsigned 32-bit integers


class TokenizeResponse(Struct):
    """The body of `/tokenize`; `token_strs` are the vocabulary's own strings, null unless asked."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct):
    """The body of `/detokenize`."""

    prompt: str


async def handle_tokenize(api: Api, request: web.Request) -> web.Response:
    """Token ids of a prompt, or of a chat through the template."""
    parsed, headers = await api.read(request, api.tokenizations)
    token_ids = (await _rendered(api, parsed)).token_ids
    strings = await api.renderer.token_strings(token_ids) if parsed.return_token_strs else None
    body = TokenizeResponse(len(token_ids), api.service.model.max_model_len, token_ids, strings)
    return json_response(body, headers=headers)


async def handle_detokenize(api: Api, request: web.Request) -> web.Response:
    """The text of token ids, special tokens included; ids beyond the vocabulary have no text."""
    parsed, headers = await api.read(request, api.detokenizations)
    if any(not 0 <= token_id <= MAX_TOKEN_ID for token_id in parsed.tokens):
        raise InvalidRequest(f"token ids are from 0 to {MAX_TOKEN_ID}", param="tokens")
    text = await api.renderer.decode(parsed.tokens)
    return json_response(DetokenizeResponse(text), headers=headers)


async def _rendered(api: Api, parsed: TokenizeRequest) -> Prompt:
    if (parsed.prompt is None) == (parsed.messages is None):
        raise InvalidRequest("either a prompt or messages are required", param="prompt")
    if parsed.prompt is not None:
        special = parsed.add_special_tokens is not False
        return await api.renderer.encode(parsed.prompt, special, any_length=True)
    options = chat_options(api, parsed)
    kwargs = options.kwargs
    if parsed.tools is not None:
        kwargs = {"tools": [for_template(tool) for tool in parsed.tools]} | kwargs
    options = msgspec.structs.replace(options, kwargs=kwargs, any_length=True)
    return await api.renderer.render_chat(parsed.messages or [], options)
