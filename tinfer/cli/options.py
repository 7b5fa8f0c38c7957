"""Click options made from the fields of a configuration struct."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union

import click
import msgspec
from click.core import ParameterSource
from msgspec import Meta, Struct

from tinfer.cli.key import KEY_OPTION
from tinfer.engine_args import plain_name

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
ParsedT = TypeVar("ParsedT")


class NumberRange(click.FloatRange):
    """Numbers only: `nan` lies within no bounds, and click lets it pass all of them."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        return self.fail("nan is not a number", param, ctx) if math.isnan(number) else number


class Words(click.ParamType[str]):
    """Text of the pattern of `meta`, whose title says it to a reader."""

    name = "text"

    def __init__(self, meta: Meta) -> None:
        self._meta = meta

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if re.search(str(self._meta.pattern), value) is None:
            self.fail(f"{value!r} is not {self._meta.title}", param, ctx)
        return str(value)


class FieldOption(click.Option):
    """An option that a variable of the environment can give as well, where the command has a prefix
    for them: an option with several values as words, or as the JSON array or object of them."""

    def value_from_envvar(self, ctx: click.Context) -> Any:
        text = self.resolve_envvar_value(ctx)
        if text is None or not self.multiple or not text.lstrip().startswith(("[", "{")):
            return super().value_from_envvar(ctx)
        try:
            given = msgspec.json.decode(text, type=list[str] | dict[str, Any])
        except msgspec.MsgspecError as error:
            hint = f"'{self.variable(ctx)}'"
            raise click.BadParameter(f"{text!r}: {error}", ctx, self, param_hint=hint) from error
        if isinstance(given, list):
            return given
        return [f"{name}={msgspec.json.encode(value).decode()}" for name, value in given.items()]

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """The variable, where that is what was wrong."""
        source = None if ctx is None else ctx.get_parameter_source(str(self.name))
        if ctx is not None and source is ParameterSource.ENVIRONMENT:
            return f"'{self.variable(ctx)}'"
        return super().get_error_hint(ctx)

    def variable(self, ctx: click.Context) -> str:
        return f"{ctx.auto_envvar_prefix}_{str(self.name).upper()}"


def options_of(config: type[Struct], skip: frozenset[str] = frozenset()) -> _Decorator:
    """A decorator that adds one option per field of `config`, in order, with its description."""
    hints = typing.get_type_hints(config, include_extras=True)
    fields = [f for f in msgspec.structs.fields(config) if f.name not in skip]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(fields):
            function = _option(field.name, hints[field.name], field.default)(function)
        return function

    return decorate


def _option(name: str, hint: Any, default: Any) -> _Decorator:
    metas = _metas(hint)
    description = next(m.description for m in metas if m.description)
    flag = "--" + name.replace("_", "-")
    base = _plain(hint)
    given: dict[str, Any] = {"default": default, "help": description, "cls": FieldOption}
    # Keys come from variables that are more than this command's; who reads them takes them away.
    given["allow_from_autoenv"] = name != KEY_OPTION
    if base is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, show_default=True, **given)
    if base is tuple:
        return click.option(flag, name, multiple=True, show_default=bool(default), **given)
    if base is dict:
        is_numbers = typing.get_args(_unannotated(hint))[1] is float
        given |= {"default": (), "callback": number_pairs if is_numbers else json_pairs}
        return click.option(flag, name, multiple=True, metavar="NAME=VALUE", **given)
    kind: Any = click.Choice(typing.get_args(base)) if _is_choice(base) else _bounded(base, metas)
    return click.option(flag, name, type=kind, show_default=default is not None, **given)


def _metas(hint: Any) -> list[Meta]:
    """All `Meta`s of a type, those inside `X | None` included."""
    found: list[Meta] = []
    if typing.get_origin(hint) is Annotated:
        found += [extra for extra in hint.__metadata__ if isinstance(extra, Meta)]
        return found + _metas(hint.__origin__)
    if typing.get_origin(hint) in (Union, types.UnionType):
        for argument in typing.get_args(hint):
            found += _metas(argument)
    return found


def _plain(hint: Any) -> Any:
    """The type below annotations and `| None`; containers by their origin."""
    if typing.get_origin(hint) is Annotated:
        return _plain(hint.__origin__)
    if typing.get_origin(hint) in (Union, types.UnionType):
        (inner,) = (a for a in typing.get_args(hint) if a is not type(None))
        return _plain(inner)
    origin = typing.get_origin(hint)
    return origin if origin in (tuple, dict) else hint


def _unannotated(hint: Any) -> Any:
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _bounded(base: Any, metas: list[Meta]) -> Any:
    bounds: dict[str, Any] = {}
    for meta in metas:
        for low, is_open in (("ge", False), ("gt", True)):
            if (value := getattr(meta, low)) is not None:
                bounds |= {"min": value, "min_open": is_open}
        if meta.le is not None:
            bounds["max"] = meta.le
    if base is int:
        return click.IntRange(**bounds) if bounds else int
    if base is float:
        return NumberRange(**bounds)
    patterned = next((meta for meta in metas if meta.pattern is not None), None)
    return base if patterned is None else Words(patterned)


def number_pairs(
    _ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    """A click callback: the `NAME=NUMBER` pairs of an option that may be given several times."""
    pairs: dict[str, float] = {}
    for value in values:
        name, equals, number = value.partition("=")
        try:
            pairs[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is not NAME=NUMBER", param=param)
    return pairs


def json_pairs(
    _ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """A click callback: `NAME=VALUE` pairs by vLLM's names, a value as JSON where it is JSON and
    else as the text that it is; or a JSON object of many."""
    pairs: dict[str, Any] = {}
    for value in values:
        if value.lstrip().startswith("{"):
            pairs |= _object(value, param)
            continue
        name, equals, text = value.partition("=")
        if not equals or not plain_name(name):
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", param=param)
        try:
            pairs[plain_name(name)] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            pairs[plain_name(name)] = text
    return pairs


def _object(text: str, param: click.Parameter) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise click.BadParameter(f"{text!r}: {error}", param=param) from error
    return {plain_name(name): value for name, value in given.items()}


def checked(flag: str, parse: Callable[[Any], ParsedT], given: Any) -> ParsedT:
    """Raises `click.BadParameter` where the parser raises `ValueError`."""
    try:
        return parse(given)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=flag) from error
