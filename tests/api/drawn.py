"""Hypothesis strategies for request bodies, drawn from the schemas of an OpenAPI document.

Just what the document of this server needs of JSON schema: references, `anyOf` and `enum`, types
with their bounds. A drawn object has a handful of its optional fields: with all sixty of them in
play no request would get beyond the first contradiction.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

MAX_OPTIONAL = 4
MAX_ITEMS = 3
ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "minItems", "maxItems", "minLength", "items")


class Drawing:
    """Draws values of the schemas of one document."""

    def __init__(self, schemas: dict[str, Any]) -> None:
        self._schemas = schemas

    def values(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """Values that the schema allows."""
        if "$ref" in schema:
            return self.values(self._schemas[schema["$ref"].rpartition("/")[2]])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        if "anyOf" in schema:
            # Bounds beside the alternatives hold for those of the type that they speak of.
            around = {name: schema[name] for name in _BOUNDS if name in schema}
            return st.one_of([self.values(self._bounded(one, around)) for one in schema["anyOf"]])
        match schema.get("type"):
            case None:
                return ANY_JSON
            case "null":
                return st.none()
            case "boolean":
                return st.booleans()
            case "string":
                return st.text(min_size=schema.get("minLength", 0), max_size=12)
            case "integer":
                return _integers(schema)
            case "number":
                return _numbers(schema)
            case "array":
                return self._arrays(schema)
            case "object":
                return self._objects(schema)
            case other:
                raise ValueError(f"a schema of type {other}")

    def _bounded(self, schema: dict[str, Any], around: dict[str, Any]) -> dict[str, Any]:
        both = {**schema, **around}
        if "items" in schema and "items" in around:
            both["items"] = self._bounded(schema["items"], around["items"])
        elif schema.get("type") != "array":
            both.pop("items", None)
        return both

    def _arrays(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", math.inf), least + MAX_ITEMS)
        items = self.values(schema.get("items", {}))
        return st.lists(items, min_size=least, max_size=int(most))

    def _objects(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        properties: dict[str, Any] = schema.get("properties", {})
        if not properties:
            inner = schema.get("additionalProperties") or {}
            values = self.values(inner if isinstance(inner, dict) else {})
            return st.dictionaries(st.text(max_size=8) | st.just("1"), values, max_size=MAX_ITEMS)
        required = schema.get("required", [])
        optional = sorted(set(properties) - set(required))

        @st.composite
        def drawn(draw: st.DrawFn) -> dict[str, Any]:
            chosen: list[str] = []
            if optional:
                names = st.lists(st.sampled_from(optional), max_size=MAX_OPTIONAL, unique=True)
                chosen = draw(names)
            return {name: draw(self.values(properties[name])) for name in [*required, *chosen]}

        return drawn()


def _integers(schema: dict[str, Any]) -> st.SearchStrategy[int]:
    least, most = schema.get("minimum"), schema.get("maximum")
    near = st.integers(least if least is not None else -2, (least or 0) + 20 if least else 20)
    return near | st.integers(least, most)


def _numbers(schema: dict[str, Any]) -> st.SearchStrategy[float]:
    exclusive = schema.get("exclusiveMinimum")
    return st.floats(
        schema.get("minimum", exclusive),
        schema.get("maximum"),
        exclude_min=exclusive is not None,
        allow_nan=False,
        allow_infinity=False,
    )


@st.composite
def broken(draw: st.DrawFn, good: st.SearchStrategy[Any]) -> Any:
    """A body with a field changed, left out or added, or another value altogether."""
    body = draw(good)
    if not isinstance(body, dict) or draw(st.integers(0, 9)) == 0:
        return draw(ANY_JSON)
    name = draw(st.sampled_from(sorted(body)) if body else st.text(max_size=8))
    match draw(st.sampled_from(["change", "drop", "add"])):
        case "change":
            body[name] = draw(ANY_JSON)
        case "drop":
            body.pop(name, None)
        case _:
            body[draw(st.text(max_size=8))] = draw(ANY_JSON)
    return body
