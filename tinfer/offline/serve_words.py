"""The arguments of `tinfer serve` from Python values."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from tinfer import config
from tinfer.config import ServeConfig

NAMES = frozenset(ServeConfig.__struct_fields__) - config.ACCESS - {"model"}


def serve_words(model: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> list[str]:
    """A model and options by their names in `ServeConfig`; None is the default.

    Raises `TypeError` for a name that is none, or that says who else may ask the server or where;
    `StartError` for a value that `tinfer serve` would not take.
    """
    for name in options:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown option {name!r} of the model's server{hint}")
    given = {name: _plain(value) for name, value in options.items() if value is not None}
    config.load(given)
    words = [] if model is None else [os.fspath(model)]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, Mapping):
            words += [f"{flag}={key}={_written(inner)}" for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            words += [f"{flag}={one}" for one in value]
        else:
            words.append(f"{flag}={value}")
    return words


def _written(value: Any) -> str:
    """As the command line reads it back: text that looks like JSON, and all that is no text, as
    JSON."""
    if isinstance(value, str):
        try:
            msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value
    return msgspec.json.encode(value).decode()


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
