"""Which web pages may ask: the cross-origin part of HTTP (CORS, in the Fetch standard).

Without an allowed origin nothing is answered to a browser's question and no header is added, so no
page of another origin can read an answer. The defaults and the meaning of `*` are those of vLLM.
"""

from __future__ import annotations

import re

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from msgspec import Struct

from tinfer.errors import Forbidden, StartError

# How long a browser need not ask again. Source: Starlette's CORSMiddleware, which vLLM has.
MAX_AGE_S = 600
ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@*\s]+")
_METHODS = "GET, POST"


class Cors(Struct, frozen=True, kw_only=True):
    """Whose pages may ask, with which methods and headers; `*` among them stands for all."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = (ANY,)
    headers: tuple[str, ...] = (ANY,)
    credentials: bool = False

    def check(self) -> None:
        """Raises `StartError` for what no browser would ever match, and for what none should."""
        for origin in self.origins:
            if origin != ANY and _ORIGIN.fullmatch(origin) is None:
                raise StartError(
                    f"--allowed-origins: {origin!r} is no origin such as https://example.org"
                )
        if self.credentials and ANY in self.origins:
            raise StartError("--allow-credentials needs --allowed-origins that are named, not *")

    def admits(self, origin: str | None) -> bool:
        """Whether a page of that origin may ask."""
        return origin is not None and (ANY in self.origins or origin in self.origins)

    def shown(self, origin: str) -> dict[str, str]:
        """The headers of every answer to a page of an admitted origin."""
        shown = ANY if ANY in self.origins else origin
        headers: dict[str, str] = {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: shown}
        if self.credentials:
            headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"
        return headers

    def preflight(self, request: web.Request) -> web.Response:
        """The answer to a browser that asks before it sends. Raises `Forbidden`."""
        if not self.admits(request.headers.get(hdrs.ORIGIN)):
            raise Forbidden("pages of this origin may not ask here")
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        headers = asked if ANY in self.headers else ", ".join(self.headers)
        methods = _METHODS if ANY in self.methods else ", ".join(self.methods)
        return web.Response(
            status=204,
            headers={
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: methods,
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: headers,
                hdrs.ACCESS_CONTROL_MAX_AGE: str(MAX_AGE_S),
            },
        )


def add_cors(app: web.Application, cors: Cors) -> None:
    """Have `app` answer browsers; refusals and streams carry the headers too."""
    if not cors.origins:
        return

    async def show(request: web.Request, response: web.StreamResponse) -> None:
        # What a cache keeps for one origin is not for another.
        if ANY not in cors.origins:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and cors.admits(origin):
            response.headers.update(cors.shown(origin))

    app.on_response_prepare.append(show)


def preflight_middleware(cors: Cors) -> Middleware:
    """Answers a browser's question; it shows no API key, so this comes before that is asked for."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        asks = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        if cors.origins and request.method == hdrs.METH_OPTIONS and asks:
            return cors.preflight(request)
        return await handler(request)

    return answer
