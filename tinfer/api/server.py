"""The HTTP application: routes, and the handlers that only report.

The first step of a request's life: everything up to `Service.submit` happens in this package.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal

from aiohttp import web
from msgspec import Struct

from tinfer.api import chat, completions, tokenize
from tinfer.api.context import Api
from tinfer.api.decode import BodyDecoder
from tinfer.api.failures import error_middleware, json_response
from tinfer.api.options import ApiOptions
from tinfer.api.render import Renderer
from tinfer.api.responses import ModelList, ModelObject, ModelPermission, new_id
from tinfer.api.service import Service
from tinfer.core.types import Role
from tinfer.errors import ModelNotFound

ApiHandler = Callable[[Api, web.Request], Awaitable[web.StreamResponse]]


def create_app(service: Service, renderer: Renderer, options: ApiOptions) -> web.Application:
    """The application; it closes `renderer` when it is cleaned up.

    Run it with `create_runner`, or clients that leave are noticed only at the next write.
    """
    api = Api(service, renderer, options)
    app = web.Application(middlewares=[error_middleware], client_max_size=options.max_body_bytes)
    routes: list[tuple[str, str, ApiHandler]] = [
        ("POST", "/v1/completions", completions.handle),
        ("POST", "/v1/chat/completions", chat.handle),
        ("POST", "/tokenize", tokenize.handle_tokenize),
        ("POST", "/detokenize", tokenize.handle_detokenize),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{name:.+}", _model),
        ("GET", "/health", _health),
        ("GET", "/ping", _health),
        ("POST", "/ping", _health),
        ("GET", "/version", _version),
        ("GET", "/debug/ledger", _ledger),
        ("GET", "/debug/state", _state),
        ("POST", "/debug/role", _role),
    ]
    for method, path, handler in routes:
        app.router.add_route(method, path, functools.partial(handler, api))

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
    return json_response({"version": api.options.version})


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
    return web.json_response({"worker": wish.worker, "role": wish.role}, status=202)
