"""From the bytes of a request body to a typed request."""

from __future__ import annotations

import re
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from tinfer.api.depth import depth_exceeds
from tinfer.api.fields import USUAL, Undeclared, screen
from tinfer.api.limits import MAX_JSON_DEPTH
from tinfer.errors import InvalidRequest

RequestT = TypeVar("RequestT", bound=Struct)

_PATH = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")
_TOO_DEEP = "the request body is nested too deeply"


class BodyDecoder(Generic[RequestT]):
    """Decodes bodies of one endpoint, with the fields that it does not declare screened."""

    def __init__(self, request_type: type[RequestT], strict: bool) -> None:
        self._declared = frozenset(f.encode_name for f in msgspec.structs.fields(request_type))
        self._typed = msgspec.json.Decoder(request_type)
        self._names = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._known: Undeclared = getattr(request_type, "undeclared", USUAL)
        self._strict = strict

    def decode(self, body: bytes) -> tuple[RequestT, list[str]]:
        """The request and the names of its unknown fields. Raises `InvalidRequest`."""
        try:
            unknown = screen(self._names.decode(body), self._declared, self._strict, self._known)
            request = self._typed.decode(body)
        except msgspec.ValidationError as error:
            raise invalid(error) from error
        except RecursionError as error:
            raise InvalidRequest(_TOO_DEEP) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
        # Counted first, which is quick: a body with fewer cannot be nested deeper.
        num_openings = body.count(b"{") + body.count(b"[")
        if num_openings > MAX_JSON_DEPTH and depth_exceeds(request, MAX_JSON_DEPTH):
            raise InvalidRequest(_TOO_DEEP)
        return request, unknown


def invalid(error: msgspec.ValidationError, prefix: str = "") -> InvalidRequest:
    """A failed type check as a 400 whose `param` is the path of the field, under `prefix`."""
    text = str(error)
    path = _PATH.search(text)
    message = _PATH.sub("", text)
    parts = [prefix] if prefix else []
    if path is not None and path[1]:
        parts.append(path[1])
    missing = _MISSING.search(message)
    if missing is not None:
        parts.append(missing[1])
    param = ".".join(parts) or None
    return InvalidRequest(f"{message} at `{param}`" if param else message, param=param)
