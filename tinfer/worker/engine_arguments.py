"""vLLM's engine arguments from plain values: does each exist, and does its value fit?

`EngineArgs` itself takes anything, and what is wrong with it shows up late and in many lines.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union

import msgspec
import pydantic

from tinfer.config import ServeConfig

_SHOWN_CHARS = 80


class UnfitArgument(Exception):
    """An argument that vLLM does not have, or a value that it does not take; the message names it
    and is one line."""


@functools.cache
def engine_hints() -> dict[str, Any]:
    """What each engine argument of the installed vLLM takes, by its name; not to be changed.

    Kept, so that workers forked after the first check have it.
    """
    from vllm.engine import arg_utils
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    # A hint that is text names what is there for type checkers only.
    hints = {
        field.name: Any if isinstance(field.type, str) else field.type
        for field in dataclasses.fields(arg_utils.EngineArgs)
        if not field.name.startswith("_")
    }
    # Plugins have added theirs; vLLM's own hint is any text.
    hints["quantization"] = Literal[tuple(QUANTIZATION_METHODS)] | None
    return hints


def converted(given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as `EngineArgs` wants them: objects of its classes for JSON objects.

    `given` has values as JSON has them. Raises `UnfitArgument` for the first that does not fit.
    """
    return {name: _converted(name, value, hints) for name, value in given.items()}


def _converted(name: str, value: Any, hints: Mapping[str, Any]) -> Any:
    is_own = name in ServeConfig.__struct_fields__
    flag = f"--{name.replace('_', '-')}" if is_own else f"--engine-arg {name}"
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnfitArgument(f"{flag}: {_vllm()} has no such engine argument{hint}")
    members = list(_members(hints[name]))
    why = ""
    for member in members:
        try:
            return _fitted(value, member)
        except (ValueError, TypeError) as error:
            if dataclasses.is_dataclass(member) and isinstance(error, pydantic.ValidationError):
                why = f" ({_first_fault(error)})"
    shown = msgspec.json.encode(value).decode()
    if len(shown) > _SHOWN_CHARS:
        shown = f"{shown[:_SHOWN_CHARS]}..."
    wanted = ", ".join(dict.fromkeys(filter(None, map(_described, members))))
    raise UnfitArgument(f"{flag}: {shown} is not what {_vllm()} takes: {wanted}{why}")


def _first_fault(error: pydantic.ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {' '.join(fault['msg'].split())}".removeprefix(": ")


def _fitted(value: Any, kind: Any) -> Any:
    """Raises `ValueError` or `TypeError` where the value is not of that kind."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _member(value, kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(value)
        return pydantic.TypeAdapter(kind).validate_python(value)
    try:
        adapter = pydantic.TypeAdapter(kind)
    except pydantic.errors.PydanticUserError:  # a class that no JSON value is
        raise TypeError(value) from None
    return adapter.validate_json(msgspec.json.encode(value), strict=True)


def _member(value: Any, kind: type[enum.Enum]) -> Any:
    """vLLM reads names in any case, and some enumerations hold other things as values."""
    by_name = {name.lower(): member for name, member in kind.__members__.items()}
    if isinstance(value, str) and value.lower() in by_name:
        return by_name[value.lower()]
    return kind(value)


def _members(hint: Any) -> Iterator[Any]:
    """The alternatives of a union, however deep."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        yield from _members(hint.__origin__)
    elif origin in (Union, types.UnionType):
        for argument in typing.get_args(hint):
            yield from _members(argument)
    else:
        yield hint


def _described(kind: Any) -> str:
    """For a reader; empty for what no JSON value can be."""
    if kind is None or kind is type(None):
        return "null"
    if typing.get_origin(kind) is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(kind.__members__)
    if dataclasses.is_dataclass(kind):
        return f"an object of {getattr(kind, '__name__', kind)}"
    plain = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if kind in plain:
        return plain[kind]
    root = typing.get_origin(kind) or kind
    if root in (list, tuple, set, frozenset):
        return f"a list ({kind})"
    return "an object" if root is dict or typing.is_typeddict(kind) else ""


def _vllm() -> str:
    module = sys.modules.get("vllm")
    return f"vLLM {getattr(module, '__version__', '')}".rstrip()
