"""The file of `tinfer serve --config`: options by their names, in TOML or YAML."""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from tinfer import config as configuration
from tinfer.cli.key import KEY_OPTION
from tinfer.config import ServeConfig
from tinfer.engine_args import plain_name
from tinfer.errors import StartError

_SUFFIXES = {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML"}
# A table of many reads better by this name; both are the same option.
_ALSO_CALLED = {"engine_args": "engine_arg"}
# Numbers that are written as text on the command line, where they have other forms too.
_NUMBERS_AS_TEXT = frozenset({"chunk_size", "prefill_devices", "decode_devices"})
_LISTS = frozenset(f.name for f in msgspec.structs.fields(ServeConfig) if f.default in ((), ("*",)))


def read_config_file(path: str) -> dict[str, Any]:
    """The options in a file, by the names of `ServeConfig`'s fields, each checked by itself.

    A list of one may be written without brackets. Raises `StartError` with one line that names the
    file and the key.
    """
    values: dict[str, Any] = {}
    for key, value in _parsed(path).items():
        name = plain_name(str(key))
        name = _ALSO_CALLED.get(name, name)
        if name not in ServeConfig.__struct_fields__:
            raise StartError(f"{path}: {key}: {_unknown(name)}")
        if name in values:
            raise StartError(f"{path}: {key}: this option is there twice")
        try:
            values[name] = configuration.taken(name, _as_written(name, value))
        except ValueError as error:
            raise StartError(f"{path}: {key}: {error}") from error
    if KEY_OPTION in values and os.stat(path).st_mode & stat.S_IRWXO:
        raise StartError(f"{path}: {KEY_OPTION}: the file is open to other users; chmod o= it")
    return values


def _parsed(path: str) -> dict[Any, Any]:
    kind = _SUFFIXES.get(Path(path).suffix.lower())
    if kind is None:
        raise StartError(f"--config {path}: its name has to end with {', '.join(_SUFFIXES)}")
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise StartError(f"--config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StartError(f"{path}: no text in UTF-8: {error.reason}") from error
    decode = msgspec.toml.decode if kind == "TOML" else msgspec.yaml.decode
    try:
        values = decode(text)
    except msgspec.DecodeError as error:
        raise StartError(f"{path}: no {kind}: {' '.join(str(error).split())}") from error
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise StartError(f"{path}: no table of options")
    return values


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, ServeConfig.__struct_fields__, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"`tinfer serve` has no such option{hint}"


def _as_written(name: str, value: Any) -> Any:
    if name in _LISTS and isinstance(value, str):
        return (value,)
    if name in _NUMBERS_AS_TEXT and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name == "engine_arg" and isinstance(value, dict):
        return {plain_name(str(argument)): given for argument, given in value.items()}
    return value
