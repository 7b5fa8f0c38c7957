"""Routes: split a request over two workers, or let one compute all of it."""

from __future__ import annotations

from tinfer.core.fleet import Fleet
from tinfer.core.requests import Request
from tinfer.core.types import Route


class FixedRoute:
    """The same route for every request."""

    def __init__(self, route: Route) -> None:
        self._route = route

    def route(self, request: Request, fleet: Fleet, now_s: float) -> Route:
        return self._route
