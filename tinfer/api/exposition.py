"""`GET /metrics`: the registry as text, in Prometheus' format or OpenMetrics, as the scraper asks.

A scrape takes milliseconds in all, so it is written one metric at a time and streams move between
two of them; what is shown was read in one moment all the same, which is the collector's matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from aiohttp import hdrs, web
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8, UNDERSCORES
from prometheus_client.registry import Collector, CollectorRegistry

from tinfer.api.context import Api

MEDIA_TYPES = ("text/plain", "application/openmetrics-text")
# What an OpenMetrics text ends with, once.
_END = b"# EOF\n"


class _One(Collector):
    """One family, for an encoder that takes registries."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


async def handle(api: Api, request: web.Request) -> web.Response:
    """As text or, where `Accept` asks for it, as OpenMetrics; `name[]` picks single series."""
    accept = ",".join(request.headers.getall(hdrs.ACCEPT, ()))
    names = request.query.getall("name[]", ())
    body, content_type = await exposition(api.service.registry, accept, names)
    return web.Response(body=body, headers={"Content-Type": content_type})


async def exposition(
    registry: CollectorRegistry, accept: str, names: Iterable[str] = ()
) -> tuple[bytes, str]:
    """The text and its content type, by an `Accept` header. `names`, if any, are the series to
    show."""
    encode, content_type = choose_encoder(accept)
    if isinstance(encode, partial) and encode.keywords.get("escaping") == UNDERSCORES:
        # All our names are legal in every format, so that nothing has to be escaped. The library's
        # OpenMetrics takes the colon in them for something that has (0.26).
        encode = partial(encode, escaping=ALLOWUTF8)
    wanted = registry.restricted_registry(names) if names else registry
    parts: list[bytes] = []
    for family in wanted.collect():
        parts.append(encode(_One(family)).removesuffix(_END))
        await asyncio.sleep(0)
    if content_type.startswith("application/openmetrics-text"):
        parts.append(_END)
    return b"".join(parts), content_type
