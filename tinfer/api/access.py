"""Who may ask for what: the first thing that is decided of a request, before its body is read.

With API keys, everything but what tells that the server lives needs one. Without, whoever reaches
the server may generate, but what looks inside or changes something (`/debug/`, `/admin/`) is for
this machine only: a client on loopback or on the Unix socket, and no browser's page.

A proxy on this machine is on loopback too, so a request that it has passed on does not count as a
local one; neither does one whose `Host` is a name, which a foreign page can have point here (DNS
rebinding), nor one that a page of another origin sends, which a browser tells.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from tinfer.api.keys import ApiKeys
from tinfer.errors import Forbidden, Unauthorized

# As in vLLM: what checks that a server lives, or watches it, shows no key.
OPEN = frozenset({"/health", "/ping", "/version", "/openapi.json", "/metrics"})
PRIVILEGED = ("/debug/", "/admin/")
# What proxies add, in their own words or in those of RFC 7239 and RFC 9110.
_PASSED_ON = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")
_UNIX = "unix"
_FROM_OUR_PAGE = frozenset({"same-origin", "none"})


def access_middleware(keys: ApiKeys) -> Middleware:
    """Lets through what may be asked. Raises `Unauthorized`, `Forbidden`."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        # The path that the router has found: no other spelling of one can get around this.
        resource = request.match_info.route.resource
        path = request.path if resource is None else resource.canonical
        if path in OPEN:
            return await handler(request)
        if not keys.admit(request.headers.get("Authorization")):
            raise Unauthorized("an API key is required: Authorization: Bearer KEY")
        if not keys and path.startswith(PRIVILEGED) and (why := why_not_local(request)):
            raise Forbidden(f"without API keys this is for clients on this machine only: {why}")
        return await handler(request)

    return check


def why_not_local(request: web.Request) -> str:
    """Why a request does not count as one of this machine; empty for one that does."""
    peer = _peer(request)
    if peer == _UNIX:
        return ""
    if not _is_loopback(peer):
        return "the connection comes from elsewhere"
    if any(name in request.headers for name in _PASSED_ON):
        return "a proxy has passed the request on"
    # Not `request.host`, which looks up this machine's name where the header is absent.
    host = request.headers.get("Host", "localhost")
    if not _is_address(host):
        return f"ask by address or as localhost, not as {host[:80]!r}"
    if not _is_no_foreign_page(request, host):
        return "a page of another origin asks"
    return ""


def _peer(request: web.Request) -> str:
    """The address at the other end; `_UNIX` of a Unix socket, empty where it has gone."""
    transport = request.transport
    if transport is None:
        return ""
    if transport.get_extra_info("socket").family == socket.AF_UNIX:
        return _UNIX
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if peer else ""


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_address(host: str) -> bool:
    """Whether a `Host` header is localhost or an IP address, with or without a port."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_no_foreign_page(request: web.Request, host: str) -> bool:
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"{request.scheme}://{host}":
        return False
    return request.headers.get("Sec-Fetch-Site", "none") in _FROM_OUR_PAGE
