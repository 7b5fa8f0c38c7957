"""The Hugging Face hub: what the environment says, and the room for models; secrets stay secret."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tinfer.doctor.finding import Finding, fault, ok, size, warning
from tinfer.doctor.shared_memory import Room, room_of

# An 8B model in bfloat16 takes 16 GB.
ROOMY_CACHE_BYTES = 20 * 10**9
SCARCE_CACHE_BYTES = 2 * 10**9
_TRUE = {"1", "ON", "YES", "TRUE"}  # Source: huggingface_hub.constants


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where models are kept. Source: huggingface_hub.constants, HF_HUB_CACHE."""
    if folder := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    return _home(environ) / "hub"


def check_hub(environ: Mapping[str, str]) -> Finding:
    """The hub's settings; of a token only that there is one."""
    token = "HF_TOKEN set" if environ.get("HF_TOKEN") else "HF_TOKEN not set"
    token_path = Path(environ.get("HF_TOKEN_PATH") or _home(environ) / "token").expanduser()
    if token_path.is_file() and not environ.get("HF_TOKEN"):
        token += ", but a login is stored"
    words = [f"HF_HOME {environ.get('HF_HOME') or 'not set'}", token]
    offline = environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    if offline:
        words.append("HF_HUB_OFFLINE set: only models that are here already")
    if endpoint := environ.get("HF_ENDPOINT"):
        words.append(f"HF_ENDPOINT {endpoint}")
    return ok("hub", "; ".join(words))


def check_cache(folder: Path, existing: Path, room: Room | None, is_writable: bool) -> Finding:
    """Room for models; `existing` is the nearest folder on the way that exists."""
    check = "model cache"
    other = "set HF_HOME to a folder"
    if room is None:
        return fault(check, f"{folder}: {existing} cannot be looked at", f"{other} that exists")
    words = f"{folder}, {size(room.free_bytes)} free"
    if not is_writable:
        return warning(
            check,
            f"{words}, but {existing} may not be written",
            f"models cannot be downloaded: {other} of your own",
        )
    if room.free_bytes < SCARCE_CACHE_BYTES:
        return warning(
            check, words, f"hardly any model fits: free disk space, or {other} with room"
        )
    if room.free_bytes < ROOMY_CACHE_BYTES:
        return warning(
            check, words, f"a model of 8 billion parameters takes 16 GB: {other} with room"
        )
    return ok(check, words)


def check_this_hub(environ: Mapping[str, str]) -> list[Finding]:
    """Both checks on the environment at hand."""
    folder = cache_folder(environ)
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    is_writable = os.access(existing, os.W_OK | os.X_OK)
    return [check_hub(environ), check_cache(folder, existing, room_of(existing), is_writable)]


def _home(environ: Mapping[str, str]) -> Path:
    default = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environ.get("HF_HOME") or default).expanduser()
