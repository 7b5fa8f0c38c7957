"""Hypothesis strategies for message structs, made from their own annotations."""

from __future__ import annotations

import functools
import types
import typing
from typing import Annotated, Any, Literal, Union

import msgspec
from hypothesis import strategies as st
from msgspec import Struct

# What msgpack can carry: 64-bit integers; NaN would not be equal to itself.
_LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=8),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    type(None): st.none(),
}
# Where a message carries what JSON has.
_LEAVES[Any] = st.recursive(
    st.one_of([_LEAVES[kind] for kind in (int, str, bool, float, type(None))]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_LEAVES[str], inner, max_size=2),
    max_leaves=4,
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that messages use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bounded(*arguments)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*(values(argument) for argument in arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if isinstance(hint, type) and issubclass(hint, Struct):
        return instances(hint)
    return _LEAVES[hint]


def _bounded(kind: Any, meta: msgspec.Meta) -> st.SearchStrategy[Any]:
    """Numbers within the bounds that the wire holds them to."""
    if kind is int:
        return st.integers(meta.ge, 2**64 - 1 if meta.le is None else int(meta.le))  # type: ignore[arg-type]
    return st.floats(meta.ge, meta.le)


@functools.cache
def instances(kind: type[Struct]) -> st.SearchStrategy[Any]:
    """Any instance of a struct; fields with a default are sometimes left out."""
    hints = typing.get_type_hints(kind, include_extras=True)
    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for field in msgspec.structs.fields(kind):
        chosen = required if field.required else optional
        chosen[field.name] = values(hints[field.name])
    fields = st.fixed_dictionaries(required, optional=optional)
    return fields.map(lambda arguments: kind(**arguments))


def any_of(union: Any) -> st.SearchStrategy[Any]:
    """Any message of a union."""
    return st.one_of([instances(kind) for kind in typing.get_args(union)])
