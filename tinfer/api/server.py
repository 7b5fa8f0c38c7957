"""The HTTP application: routes, and the handlers that only report.

The first step of a request's life: everything up to `Service.submit` happens in this package.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from tinfer.api import chat, completions, exposition, lately, openapi, tokenize
from tinfer.api.access import access_middleware
from tinfer.api.connection import body_middleware
from tinfer.api.context import Api
from tinfer.api.cors import add_cors, preflight_middleware
from tinfer.api.decode import BodyDecoder
from tinfer.api.failures import error_middleware, json_response
from tinfer.api.openapi import Endpoint
from tinfer.api.options import ApiOptions
from tinfer.api.parsing import Parsers
from tinfer.api.render import Renderer
from tinfer.api.request_log import log_middleware, show_id
from tinfer.api.responses import (
    ChatCompletion,
    ChatDelta,
    Completion,
    CompletionDelta,
    ModelList,
    ModelObject,
    ModelPermission,
    Version,
    new_id,
)
from tinfer.api.responses_api import handler as responses_handler
from tinfer.api.responses_api.bodies import Response
from tinfer.api.responses_api.events import EVENTS
from tinfer.api.responses_api.request import ResponsesRequest
from tinfer.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tinfer.api.service import Service
from tinfer.api.tokenize import DetokenizeResponse, TokenizeResponse
from tinfer.core.types import Role
from tinfer.errors import ModelNotFound

# A day: what has not ended by then is not waited for.
MAX_DRAIN_S = 86400.0


def create_app(
    service: Service, renderer: Renderer, options: ApiOptions, parsers: Parsers | None = None
) -> web.Application:
    """The application; it closes `renderer` when it is cleaned up.

    Run it with `create_runner`, or clients that leave are noticed only at the next write.
    """
    api = Api(service, renderer, options, parsers)
    app = web.Application(
        middlewares=[
            log_middleware,
            error_middleware,
            preflight_middleware(options.cors),
            access_middleware(options.api_keys),
            body_middleware(options.body_timeout_s, options.max_arriving_bytes),
        ],
        client_max_size=options.max_body_bytes,
    )
    app.on_response_prepare.append(show_id)
    add_cors(app, options.cors)
    for endpoint in ENDPOINTS:
        handler = functools.partial(endpoint.handler, api)
        app.router.add_route(endpoint.method, endpoint.path, handler)

    async def close_renderer(_: web.Application) -> AsyncIterator[None]:
        yield
        renderer.close()

    app.cleanup_ctx.append(close_renderer)
    return app


def create_runner(app: web.Application, shutdown_timeout_s: float = 60.0) -> web.AppRunner:
    """A runner that cancels a handler as soon as its client is gone, streaming or not.

    Requests that still run at `cleanup` get `shutdown_timeout_s` to finish.
    """
    return web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=shutdown_timeout_s
    )


async def _models(api: Api, request: web.Request) -> web.Response:
    return json_response(ModelList([_card(api, name) for name in api.service.model.names]))


async def _model(api: Api, request: web.Request) -> web.Response:
    name = request.match_info["name"]
    if name not in api.service.model.names:
        raise ModelNotFound(f"the model `{name}` does not exist", param="model")
    return json_response(_card(api, name))


def _card(api: Api, name: str) -> ModelObject:
    model = api.service.model
    permission = ModelPermission(f"modelperm-{new_id()}", model.created_s)
    return ModelObject(name, model.created_s, model.root, model.max_model_len, [permission])


async def _health(api: Api, request: web.Request) -> web.Response:
    """200 with no body as in vLLM; 503 with the reason, as text."""
    healthy, why = api.service.healthy()
    return web.Response() if healthy else web.Response(status=503, text=why)


async def _version(api: Api, request: web.Request) -> web.Response:
    return json_response(Version(api.options.version))


async def _ledger(api: Api, request: web.Request) -> web.Response:
    return json_response(api.service.ledger())


async def _state(api: Api, request: web.Request) -> web.Response:
    return json_response(api.service.state())


class RoleWish(Struct, forbid_unknown_fields=True):
    """The body of `POST /debug/role`."""

    worker: str
    role: Literal["prefill", "decode"]


_ROLE_WISHES = BodyDecoder(RoleWish, strict=True)


async def _role(api: Api, request: web.Request) -> web.Response:
    """202: it takes the role once it has drained, which `/debug/state` shows."""
    wish, _ = _ROLE_WISHES.decode(await request.read())
    api.service.ask_role(wish.worker, Role(wish.role))
    return json_response(wish, status=202)


class LeaveWish(Struct, forbid_unknown_fields=True):
    """The body of `POST /admin/drain` and `/admin/restart`: what the worker still has after
    `timeout_s` goes on elsewhere."""

    worker: str
    timeout_s: Annotated[float, Meta(ge=0, le=MAX_DRAIN_S)] = 30.0


_LEAVE_WISHES = BodyDecoder(LeaveWish, strict=True)


async def _drain(api: Api, request: web.Request) -> web.Response:
    """202: `/debug/state` shows it draining, and stopped at the end."""
    wish, _ = _LEAVE_WISHES.decode(await request.read())
    api.service.drain(wish.worker, wish.timeout_s)
    return json_response(wish, status=202)


async def _restart(api: Api, request: web.Request) -> web.Response:
    """202: `/debug/state` shows it draining, starting, and ready under another generation."""
    wish, _ = _LEAVE_WISHES.decode(await request.read())
    api.service.restart(wish.worker, wish.timeout_s)
    return json_response(wish, status=202)


async def _openapi(api: Api, request: web.Request) -> web.Response:
    """What this server answers to, as an OpenAPI 3.1 document."""
    return json_response(await asyncio.to_thread(_document, api.options.version))


@functools.cache
def _document(version: str) -> msgspec.Raw:
    """Encoded once; it takes 50 ms, which no stream may have to wait for."""
    return msgspec.Raw(msgspec.json.encode(openapi.document(ENDPOINTS, version)))


_READS = (400, 404, 413)
_RUNS = (*_READS, 429, 504)

# Every route, and all that the document says of it.
ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/completions",
        handler=completions.handle,
        summary="Continue prompts",
        takes=CompletionRequest,
        gives=Completion,
        event=CompletionDelta,
        errors=_RUNS,
    ),
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        handler=chat.handle,
        summary="Answer a chat",
        takes=ChatRequest,
        gives=ChatCompletion,
        event=ChatDelta,
        errors=_RUNS,
    ),
    Endpoint(
        method="POST",
        path="/v1/responses",
        handler=responses_handler.handle,
        summary="Answer a chat as a response",
        takes=ResponsesRequest,
        gives=Response,
        events=EVENTS,
        errors=_RUNS,
    ),
    *(
        Endpoint(
            method=method,
            path="/v1/responses/{response_id}" + action,
            handler=responses_handler.handle_stored,
            summary="Responses are not stored",
            status=404,
            errors=(404,),
        )
        for method, action in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"))
    ),
    Endpoint(
        method="POST",
        path="/tokenize",
        handler=tokenize.handle_tokenize,
        summary="A prompt or a chat as token ids",
        takes=TokenizeRequest,
        gives=TokenizeResponse,
        errors=_RUNS,
    ),
    Endpoint(
        method="POST",
        path="/detokenize",
        handler=tokenize.handle_detokenize,
        summary="Token ids as text",
        takes=DetokenizeRequest,
        gives=DetokenizeResponse,
        errors=_RUNS,
    ),
    Endpoint(
        method="GET",
        path="/v1/models",
        handler=_models,
        summary="The served model under each of its names",
        gives=ModelList,
    ),
    Endpoint(
        method="GET",
        path="/v1/models/{name:.+}",
        handler=_model,
        summary="The served model under one of its names, which may hold slashes",
        gives=ModelObject,
        errors=(404,),
    ),
    *(
        Endpoint(
            method=method,
            path=path,
            handler=_health,
            summary="Whether requests can be served now",
            plain_errors=(503,),
        )
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"))
    ),
    Endpoint(
        method="GET",
        path="/metrics",
        handler=exposition.handle,
        summary="Metrics for Prometheus",
        texts=exposition.MEDIA_TYPES,
    ),
    Endpoint(
        method="GET",
        path="/version",
        handler=_version,
        summary="The version of tinfer",
        gives=Version,
    ),
    Endpoint(
        method="GET",
        path="/openapi.json",
        handler=_openapi,
        summary="This document",
        gives=dict[str, Any],
    ),
    Endpoint(
        method="GET",
        path="/debug/ledger",
        handler=_ledger,
        summary="What is open right now; all zero when idle",
        gives=dict[str, Any],
    ),
    Endpoint(
        method="GET",
        path="/debug/state",
        handler=_state,
        summary="Workers, and requests by phase",
        gives=dict[str, Any],
    ),
    Endpoint(
        method="GET",
        path="/debug/trace",
        handler=lately.handle,
        summary="What requests and workers did lately, as a Chrome trace",
        query=lately.QUERY,
        gives=dict[str, Any],
        errors=(400, 404),
    ),
    Endpoint(
        method="POST",
        path="/debug/role",
        handler=_role,
        summary="Have a worker change its role",
        takes=RoleWish,
        gives=RoleWish,
        status=202,
        errors=(400, 413),
    ),
    *(
        Endpoint(
            method="POST",
            path=path,
            handler=handler,
            summary=summary,
            takes=LeaveWish,
            gives=LeaveWish,
            status=202,
            errors=(400, 413),
        )
        for path, handler, summary in (
            ("/admin/drain", _drain, "Take a worker out of service once it is empty"),
            ("/admin/restart", _restart, "Start a worker anew once it is empty"),
        )
    ),
)
