"""From `structured_outputs` and `response_format` to a `StructuredSpec`.

Checks what can be checked without a grammar compiler, as vLLM 0.32 does before it calls one; a
schema or grammar that does not compile is refused by the worker.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tinfer.api.decode import invalid
from tinfer.api.depth import depth_exceeds
from tinfer.api.limits import (
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_TAG_DEPTH,
    MAX_WHITESPACE_PATTERN_BYTES,
)
from tinfer.api.schemas import ResponseFormat, StructuredOutputs
from tinfer.core.sampling import StructuredSpec
from tinfer.errors import InvalidRequest

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
# Kind → bytes of UTF-8; a list of choices counts with what surrounds each in the grammar.
_MAX_BYTES = {
    "json": MAX_GRAMMAR_BYTES,
    "regex": MAX_REGEX_BYTES,
    "choice": MAX_GRAMMAR_BYTES,
    "grammar": MAX_GRAMMAR_BYTES,
    "structural_tag": MAX_GRAMMAR_BYTES,
    "whitespace_pattern": MAX_WHITESPACE_PATTERN_BYTES,
}
_PER_CHOICE_BYTES = 5
_PARAM = "structured_outputs"
_FORMAT = "response_format"


def structured_spec(
    asked: StructuredOutputs | None, response_format: msgspec.Raw
) -> StructuredSpec | None:
    """What the answer must match, or None. Raises `InvalidRequest`.

    An empty `response_format` is an absent one; any but text adds its constraint to
    `structured_outputs`, and two kinds of constraint are one too many.
    """
    extra = _from_format(response_format) if bytes(response_format) else {}
    if asked is None and not extra:
        return None
    fields = {} if asked is None else _from_asked(asked)
    fields.update(extra)
    num_kinds = sum(kind in fields for kind in _KINDS)
    if num_kinds != 1:
        raise InvalidRequest(
            f"exactly one of {', '.join(_KINDS)} must constrain the answer, got {num_kinds}",
            param=_PARAM if asked is not None else _FORMAT,
        )
    _check(fields, _FORMAT if extra else _PARAM)
    return StructuredSpec(**fields)


def check_generated(spec: StructuredSpec | None, param: str) -> None:
    """Holds what a parser made of a request's tools to the limits of what a client may send.

    Raises `InvalidRequest` with `param`.
    """
    if spec is None:
        return
    fields = {kind: value for kind in _KINDS if (value := getattr(spec, kind)) is not None}
    _check(fields, param)


def _from_asked(asked: StructuredOutputs) -> dict[str, Any]:
    if asked.disable_additional_properties:
        raise InvalidRequest(
            "disable_additional_properties is not supported",
            param=f"{_PARAM}.disable_additional_properties",
        )
    fields: dict[str, Any] = {
        kind: value for kind in _KINDS if (value := getattr(asked, kind)) is not None
    }
    if isinstance(asked.json, dict):
        fields["json"] = _as_text(asked.json)
    fields["disable_any_whitespace"] = bool(asked.disable_any_whitespace)
    fields["whitespace_pattern"] = asked.whitespace_pattern
    return fields


def _from_format(raw: msgspec.Raw) -> dict[str, Any]:
    try:
        text = bytes(raw).decode()
        parsed = msgspec.json.decode(text, type=ResponseFormat | None)
    except msgspec.ValidationError as error:
        raise invalid(error, _FORMAT) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("is not valid JSON", param=_FORMAT) from error
    if parsed is None or parsed.type == "text":
        return {}
    if parsed.type == "json_object":
        return {"json_object": True}
    if parsed.type == "structural_tag":
        return {"structural_tag": text}
    if parsed.json_schema is None or parsed.json_schema.json_schema is None:
        raise InvalidRequest("a schema is required", param=f"{_FORMAT}.json_schema")
    return {"json": _as_text(parsed.json_schema.json_schema)}


def _as_text(schema: dict[str, Any]) -> str:
    return msgspec.json.encode(schema).decode()


def _check(fields: dict[str, Any], param: str) -> None:
    for kind, most_bytes in _MAX_BYTES.items():
        if (num_bytes := _size_bytes(fields.get(kind))) > most_bytes:
            message = f"{kind} has {num_bytes} bytes; at most {most_bytes} are taken"
            raise InvalidRequest(message, param=param)
    if len(fields.get("choice") or ()) > MAX_CHOICES:
        raise InvalidRequest(f"choice takes at most {MAX_CHOICES} strings", param=param)
    for kind in ("json", "grammar", "structural_tag"):
        if kind in fields and not fields[kind].strip():
            raise InvalidRequest(f"{kind} must not be empty", param=param)
    if fields.get("choice") == []:
        raise InvalidRequest("choice must not be empty", param=param)
    if fields.get("json_object") is False:
        raise InvalidRequest("json_object must be true when it is set", param=param)
    if "\x00" in fields.get("regex", ""):
        raise InvalidRequest("regex must not hold a NUL character", param=param)
    for kind, limit in (("json", MAX_SCHEMA_DEPTH), ("structural_tag", MAX_TAG_DEPTH)):
        if kind in fields and depth_exceeds(_parse(fields[kind], kind, param), limit):
            raise InvalidRequest(f"{kind} is nested deeper than {limit} levels", param=param)


def _parse(text: str, kind: str, param: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{kind} is not JSON that can be read", param=param) from error


def _size_bytes(value: str | list[str] | None) -> int:
    if isinstance(value, list):
        return sum(len(choice.encode()) + _PER_CHOICE_BYTES for choice in value)
    return len((value or "").encode())
