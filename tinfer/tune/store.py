"""Where tunings are kept: one JSON file per identity, in the user's cache directory.

A file is replaced as a whole or not at all, so a reader never sees half of one.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import msgspec

from tinfer.atomic_file import replace_file
from tinfer.errors import StartError
from tinfer.tune.identity import Identity
from tinfer.tune.tuning import VERSION, Tuning

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tinfer/tune`, by default below ~/.cache; like that standard, a relative path
    in the variable counts as none. Raises `StartError` for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        raise StartError("no place for tunings: there is no home directory; set XDG_CACHE_HOME")
    return Path(cache) / "tinfer" / "tune"


def save(tuning: Tuning, folder: Path | None = None) -> Path:
    """Store it in place of an older one for the same identity; returns the file.

    Raises `OSError` where that cannot be written (nothing is left then), and `StartError`.
    """
    folder = default_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tuning.identity.file_name
    replace_file(path, encode(tuning))
    return path


def load_for(identity: Identity, folder: Path | None = None) -> Tuning | None:
    """What is stored for exactly this identity, or None.

    A file that cannot be used (damaged, or of another version) is none, with one warning per
    process and file.
    """
    try:
        tuning = read((default_folder() if folder is None else folder) / identity.file_name)
    except FileNotFoundError:
        return None
    except StartError as error:
        _warn_once(error.message)
        return None
    return tuning if tuning.identity == identity else None


def read(path: Path) -> Tuning:
    """A file of `tinfer tune`, from wherever.

    Raises `FileNotFoundError`, and `StartError` for one that cannot be used.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != VERSION:
            raise StartError(f"{path} is of version {version}, not {VERSION}: tune again")
        return msgspec.json.decode(data, type=Tuning)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartError(f"{path} is damaged: {error}") from error


def encode(tuning: Tuning) -> bytes:
    """As JSON for a person to read too."""
    return msgspec.json.format(msgspec.json.encode(tuning), indent=1) + b"\n"


class _Versioned(msgspec.Struct):
    """The one field that is read before the rest, which may be of another shape."""

    version: int


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("no stored tuning is used: %s", reason)
