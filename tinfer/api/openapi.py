"""The server's own description: an OpenAPI 3.1 document of the endpoints that it routes.

`server.ENDPOINTS` is the one table behind the router and the document; the schemas are made from
the structs that requests are decoded into and answers are encoded from. Of what is checked beyond
types it has what holds for every model (`_RULES`); other mistakes are answered with 400 as well.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct, UnsetType

from tinfer.api.access import OPEN, PRIVILEGED
from tinfer.api.context import Api
from tinfer.api.deadline import HEADER as TIMEOUT_HEADER
from tinfer.api.fields import IGNORED_HEADER, Undeclared
from tinfer.api.limits import INT64_MAX, INT64_MIN, MAX_N, MAX_STOP_STRINGS
from tinfer.api.request_log import ID_HEADER
from tinfer.api.responses import ChunkHead, ChunkTail, ErrorBody
from tinfer.api.responses_api.events import Event, name_of
from tinfer.api.responses_api.request import ResponsesRequest
from tinfer.api.schemas import (
    Addressed,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GeneratingFields,
    ResponseFormat,
    SamplingFields,
)
from tinfer.api.tokenize import MAX_TOKEN_ID
from tinfer.api.trace import TRACE_HEADER, Foretold, Shown

Schema = dict[str, Any]
ApiHandler = Callable[[Api, web.Request], Awaitable[web.StreamResponse]]

_REFERENCE = "#/components/schemas/{name}"
_TOKEN_IDS: Schema = {"items": {"minimum": 0}}
_PENALTY: Schema = {"minimum": -2, "maximum": 2}
_COUNT_OR_ALL: Schema = {"minimum": -1}
_PROMPT_FORMS: list[Schema] = [
    {"type": "string", "minLength": 1},
    {"type": "array", "items": {"type": "string"}, "minItems": 1},
    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        "minItems": 1,
    },
]
# Struct, for its subclasses too → field → what `sampling.py` and the handlers check by hand.
_RULES: dict[type[Struct], dict[str, Schema]] = {
    GeneratingFields: {
        "temperature": {"minimum": 0, "maximum": 2},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1, "maximum": INT64_MAX},
        "min_p": {"minimum": 0, "maximum": 1},
        "seed": {"minimum": INT64_MIN, "maximum": INT64_MAX},
        "presence_penalty": _PENALTY,
        "frequency_penalty": _PENALTY,
        "repetition_penalty": {"exclusiveMinimum": 0},
        "stop": {"minLength": 1, "maxItems": MAX_STOP_STRINGS, "items": {"minLength": 1}},
        "stop_token_ids": _TOKEN_IDS,
    },
    SamplingFields: {
        "n": {"minimum": 1, "maximum": MAX_N},
        "min_tokens": {"minimum": 0},
        "allowed_token_ids": {"minItems": 1, **_TOKEN_IDS},
        "bad_words": {"items": {"minLength": 1}},
        "prompt_logprobs": _COUNT_OR_ALL,
        "response_format": {
            "anyOf": [{"$ref": _REFERENCE.format(name=ResponseFormat.__name__)}, {"type": "null"}]
        },
    },
    CompletionRequest: {
        "prompt": {"anyOf": _PROMPT_FORMS},
        "max_tokens": {"minimum": 0},
        "logprobs": _COUNT_OR_ALL,
    },
    ChatRequest: {
        "messages": {"minItems": 1},
        "max_tokens": {"minimum": 1},
        "max_completion_tokens": {"minimum": 1},
        "top_logprobs": _COUNT_OR_ALL,
        "tools": {"minItems": 1},
    },
    ResponsesRequest: {"max_output_tokens": {"minimum": 1}, "top_logprobs": _COUNT_OR_ALL},
    DetokenizeRequest: {"tokens": {"items": {"minimum": 0, "maximum": MAX_TOKEN_ID}}},
}
_NEVER_NULL: dict[type[Struct], tuple[str, ...]] = {CompletionRequest: ("prompt",)}

_ERRORS = {
    400: "The request is at fault; `param` names the field.",
    401: "The server has API keys, and the request shows none of them.",
    403: "Without API keys: what looks inside is for clients on this machine only.",
    404: "No model of that name is served, or no such request or response is known.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "The server is full; come back after `Retry-After` seconds.",
    431: "The head of the request is too large.",
    500: "The server, or every worker that it tried, failed on the request.",
    504: "The answer took longer than it was given.",
    503: "The server is starting or stopping, is out of connections, or has no worker.",
}
_KEY = "key"
_RETRY_AFTER: Schema = {
    "description": "Seconds until another try is worth it.",
    "schema": {"type": "integer", "minimum": 1},
}
_IGNORED: Schema = {
    "description": "The fields of the body that nobody knows.",
    "schema": {"type": "string"},
}
_ASK_TRACE: Schema = {
    "name": TRACE_HEADER,
    "in": "header",
    "description": "Have the answer tell how it was served, under `tinfer`.",
    "schema": {"type": "string", "pattern": "^(0|1|[Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee])?$"},
}
_OWN_ID: Schema = {
    "name": ID_HEADER,
    "in": "header",
    "description": "Comes back in the same header and ends the answer's `id`; the body's "
    "`request_id` does where this is not sent.",
    "schema": {"type": "string"},
}

_OWN_LIMIT: Schema = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": "Seconds after which the answer is no longer wanted.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


class Endpoint(Struct, frozen=True, kw_only=True):
    """One route: what is called, and what a client has to know.

    `takes` is the struct that the body is decoded into; `gives` the type of the answer's JSON, None
    for an empty body; where the endpoint generates, `event` is one choice of a stream's chunk, or
    `events` are all that a stream has, each under its name; `texts` the media types of an answer
    that is text; `query` its parameters behind the path, as the document has them. Errors are
    answered with an `ErrorBody`, those in `plain_errors` also in plain text.
    """

    method: str
    path: str
    handler: ApiHandler
    summary: str
    takes: type[Struct] | None = None
    gives: Any = None
    event: type[Struct] | None = None
    events: tuple[type[Event], ...] = ()
    status: int = 200
    texts: tuple[str, ...] = ()
    query: tuple[Schema, ...] = ()
    errors: tuple[int, ...] = ()
    plain_errors: tuple[int, ...] = ()

    @property
    def generates(self) -> bool:
        """Whether a client may ask for a stream."""
        return self.event is not None or bool(self.events)

    @property
    def shown_path(self) -> str:
        """The path as the document writes it: parameters without their patterns."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)


def document(endpoints: typing.Iterable[Endpoint], version: str) -> Schema:
    """The whole document, ready to be encoded."""
    endpoints = list(endpoints)
    paths: dict[str, Schema] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.shown_path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tinfer",
            "version": version,
            "description": "Completions, chat and responses as OpenAI and `vllm serve` have them.",
        },
        "paths": paths,
        "components": {
            "schemas": _requests(endpoints) | _replies(endpoints),
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint) -> Schema:
    words = re.findall(r"\w+", endpoint.shown_path)
    operation: Schema = {
        "operationId": "_".join([endpoint.method.lower(), *words]),
        "summary": endpoint.summary,
        "responses": _responses(endpoint),
    }
    if about := inspect.getdoc(endpoint.handler):
        operation["description"] = about
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", endpoint.shown_path)
    ]
    parameters += endpoint.query
    if endpoint.generates:
        parameters += [_ASK_TRACE, _OWN_ID, _OWN_LIMIT]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.path not in OPEN:
        operation["security"] = [{}, {_KEY: []}]  # either, as the server has no keys or has some
    if endpoint.takes is not None:
        content = {"application/json": {"schema": _reference(endpoint.takes)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(endpoint: Endpoint) -> Schema:
    success: Schema = {"description": endpoint.summary}
    if endpoint.gives is not None:
        success["content"] = {"application/json": {"schema": _schema_of(endpoint.gives)}}
    if endpoint.texts:
        success["content"] = {kind: {"schema": {"type": "string"}} for kind in endpoint.texts}
    if endpoint.generates:
        success["content"]["text/event-stream"] = _stream(endpoint)
    if endpoint.takes is not None and issubclass(endpoint.takes, Addressed):
        success["headers"] = {IGNORED_HEADER: _IGNORED}
    responses = {str(endpoint.status): success}
    as_json = {"application/json": {"schema": _reference(ErrorBody)}}
    as_text = {"text/plain": {"schema": {"type": "string"}}}
    for status in sorted({*endpoint.errors, *_statuses_of_all(endpoint)}):
        content = as_json | as_text if status in endpoint.plain_errors else as_json
        answer: Schema = {"description": _ERRORS[status], "content": content}
        if status in (429, 503):
            answer["headers"] = {"Retry-After": _RETRY_AFTER}
        responses[str(status)] = answer
    responses["default"] = {"description": "Any other error.", "content": as_json}
    return responses


def _statuses_of_all(endpoint: Endpoint) -> Iterator[int]:
    """Errors that no handler names: any head can be too large, any connection meet a 503 of the
    listener, any handler fail."""
    yield from (431, 500, 503)
    if endpoint.path not in OPEN:
        yield 401
    if endpoint.path.startswith(PRIVILEGED):
        yield 403
    if endpoint.takes is not None:
        yield 408


def _stream(endpoint: Endpoint) -> Schema:
    """One server-sent event, which is what tools take the schema of a stream for in OpenAPI 3.1."""
    if endpoint.event is None:
        return _named_stream(endpoint.events)
    chunk = {"$ref": _REFERENCE.format(name=_chunk_name(endpoint.event))}
    said = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [chunk, _reference(ErrorBody)]},
    }
    about = "With `stream`: chunks, an error where the stream fails, and at last `[DONE]`."
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, said]}
    event_schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"schema": event_schema | {"description": about}}


def _named_stream(events: tuple[type[Event], ...]) -> Schema:
    data: Schema = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(event) for event in events]},
    }
    properties = {"event": {"enum": [name_of(event) for event in events]}, "data": data}
    about = "With `stream`: events by name; the last one has the whole response, or its error."
    return {
        "schema": {
            "type": "object",
            "properties": properties,
            "required": [*properties],
            "description": about,
        }
    }


def _requests(endpoints: list[Endpoint]) -> dict[str, Schema]:
    """The schemas of all bodies that are read."""
    bodies = [endpoint.takes for endpoint in endpoints if endpoint.takes is not None]
    _, components = msgspec.json.schema_components(
        [*bodies, ResponseFormat], ref_template=_REFERENCE
    )
    for body in bodies:
        schema = components[body.__name__]
        properties = schema["properties"]
        for kind, rules in _RULES.items():
            if issubclass(body, kind):
                for name, rule in rules.items():
                    properties[name] = _with(properties[name], rule)
        for name in _NEVER_NULL.get(body, ()):
            del properties[name]["default"]
            schema["required"].append(name)
        if issubclass(body, Addressed):
            _refuse(properties, body.undeclared)
    return components


def _with(schema: Schema, rule: Schema) -> Schema:
    """Both of them; what each says of its items is joined too."""
    both = schema | rule
    if "items" in schema and "items" in rule:
        both["items"] = schema["items"] | rule["items"]
    return both


def _refuse(properties: Schema, known: Undeclared) -> None:
    """Add the fields that are known and not carried out, each with the values that mean "off"."""
    for name, off in known.refused.items():
        if name not in properties:
            about = "Not supported: takes only what changes nothing."
            properties[name] = {"enum": list(off), "description": about}


def _replies(endpoints: list[Endpoint]) -> dict[str, Schema]:
    """The schemas of all bodies that are sent."""
    kinds: list[Any] = [endpoint.gives for endpoint in endpoints if endpoint.gives is not None]
    kinds += [_chunk(endpoint.event) for endpoint in endpoints if endpoint.event is not None]
    kinds += [event for endpoint in endpoints for event in endpoint.events]
    kinds += [ErrorBody, *Shown.__subclasses__(), *Foretold.__subclasses__()]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    for kind in {struct for hint in kinds for struct in _structs_in(hint)}:
        schema = components[kind.__name__]
        hints = typing.get_type_hints(kind)
        for property_ in schema["properties"].values():
            property_.pop("default", None)
        # What has a default is sent all the same; only what may be UNSET can be missing.
        tag_field = kind.__struct_config__.tag_field
        schema["required"] = [] if tag_field is None else [tag_field]
        schema["required"] += [
            field.encode_name
            for field in msgspec.structs.fields(kind)
            if UnsetType not in typing.get_args(hints[field.name])
        ]
    for either in (Shown, Foretold):
        components[either.__name__] = {"anyOf": list(map(_reference, either.__subclasses__()))}
    return components


def _structs_in(hint: Any) -> Iterator[type[Struct]]:
    """Every struct that a type mentions, at any depth."""
    if isinstance(hint, type) and issubclass(hint, Struct):
        yield hint
        for inner in typing.get_type_hints(hint).values():
            yield from _structs_in(inner)
    for argument in typing.get_args(hint):
        yield from _structs_in(argument)


def _chunk(event: type[Struct]) -> type[Struct]:
    """One event of a stream as a struct: `sse.Framer` writes it in these three pieces."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for part in (ChunkHead, ChunkTail):
        hints = typing.get_type_hints(part)
        if part is ChunkTail:
            fields.append(("choices", list[event]))  # type: ignore[valid-type]
        for field in msgspec.structs.fields(part):
            hint = hints[field.name]
            fields.append(
                (field.name, hint) if field.required else (field.name, hint, field.default)
            )
    chunk = msgspec.defstruct(_chunk_name(event), fields)
    chunk.__doc__ = "One event of a stream."
    return chunk


def _chunk_name(event: type[Struct]) -> str:
    return event.__name__.removesuffix("Delta") + "Chunk"


def _schema_of(kind: Any) -> Schema:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REFERENCE)
    return schema


def _reference(kind: type[Struct]) -> Schema:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}
