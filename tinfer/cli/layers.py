"""Where each option's value comes from: a flag, the environment, a file, or its default.

Options with names of their own inside, such as `engine_arg`, are put together name by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import click
from click.core import ParameterSource
from msgspec import Struct

from tinfer.cli.config_file import read_config_file
from tinfer.cli.key import KEY_OPTION, KEY_VARIABLES
from tinfer.config import ServeConfig

PREFIX = "TINFER"
MODEL_VARIABLE = f"{PREFIX}_MODEL"
Kind = Literal["flag", "environment", "file", "default"]


class Source(Struct, frozen=True):
    """Who gave a value; `name` is the variable or the file, None for the others."""

    kind: Kind
    name: str | None = None


class Given(Struct, frozen=True):
    """Values by the names of `ServeConfig`'s fields, and the source of each; "fake_engine.step_s"
    for one inside an option. What is in neither has its default."""

    values: dict[str, Any]
    sources: dict[str, Source]


_DEFAULT, _FLAG = Source("default"), Source("flag")


def put_together(
    context: click.Context,
    values: Mapping[str, Any],
    path: str | None,
    environment: Mapping[str, str],
) -> Given:
    """What the command was given, the options of the file at `path` below it.

    `values` are click's of all options, from flags, variables and defaults. A key in the
    environment goes before those of the file, which are then left out. Raises `StartError` for what
    is wrong with the file.
    """
    given = Given({}, {})
    upper = {name: _source(context, name) for name in values}
    from_file = {} if path is None else read_config_file(path)
    keys = ("api_key_file", KEY_OPTION)
    variable = next((name for name in KEY_VARIABLES if name in environment), None)
    if variable is not None and all(upper[name] == _DEFAULT for name in keys):
        from_file = {name: value for name, value in from_file.items() if name not in keys}
        if not any(name in from_file for name in keys):
            given.sources[KEY_OPTION] = Source("environment", variable)
    for name, value in from_file.items():
        _add(given, name, value, Source("file", path))
    for name, value in _from_environment_too(context, upper).items():
        _add(given, name, value, Source("environment", f"{PREFIX}_{name.upper()}"))
    for name, value in values.items():
        if upper[name] != _DEFAULT:
            _add(given, name, value, upper[name])
    return given


def _from_environment_too(context: click.Context, upper: Mapping[str, Source]) -> dict[str, Any]:
    """What the environment says of options with names inside, of which click has taken the flags
    alone."""
    found: dict[str, Any] = {}
    for option in context.command.params:
        name = str(option.name)
        if upper.get(name) == _FLAG and isinstance(context.params[name], dict):
            written = option.value_from_envvar(context)
            if written is not None:
                found[name] = option.process_value(context, written)
    return found


def _add(given: Given, name: str, value: Any, source: Source) -> None:
    if isinstance(value, dict):
        given.values[name] = given.values.get(name, {}) | value
        given.sources.update({f"{name}.{inner}": source for inner in value})
    else:
        given.values[name] = value
        given.sources[name] = source


def _source(context: click.Context, name: str) -> Source:
    match context.get_parameter_source(name):
        case ParameterSource.COMMANDLINE:
            return _FLAG
        case ParameterSource.ENVIRONMENT:
            return Source("environment", f"{PREFIX}_{name.upper()}")
    return _DEFAULT


def flattened(config: ServeConfig, given: Given) -> dict[str, tuple[Any, Source]]:
    """Each effective value with its source, one per name inside an option that has such.

    Of API keys only whether there are any.
    """
    rows: dict[str, tuple[Any, Source]] = {}
    for name in ServeConfig.__struct_fields__:
        value = getattr(config, name)
        source = given.sources.get(name, _DEFAULT)
        if name == KEY_OPTION:
            rows[name] = ("not set" if source == _DEFAULT else "set", source)
        elif isinstance(value, dict) and value:
            for inner, one in value.items():
                rows[f"{name}.{inner}"] = (one, given.sources[f"{name}.{inner}"])
        else:
            rows[name] = (value, source)
    return rows
