"""The server under test: whether it is there, which model it serves, and whether it is tinfer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from tinfer.client.aio import AsyncClient
from tinfer.client.connection import server_url
from tinfer.client.errors import ConnectionFailed, RequestTimeout, ServerUnavailable
from tinfer.client.results import Model
from tinfer.errors import StartError

_RETRY_INTERVAL_S = 1.0
_ASK_TIMEOUT_S = 30.0
# Within the vocabulary of about every model that is served; more of it is better, see `TokenRange`.
_UNKNOWN_VOCAB_SIZE = 1000


class Target(Struct, frozen=True, kw_only=True):
    """A server that answered `/v1/models`; `max_model_len` in tokens where it says it."""

    base_url: str
    model: str
    max_model_len: int | None
    root: str | None
    is_tinfer: bool


class TokenRange(Struct, frozen=True):
    """Token ids that prompts are drawn from: `first_id` up to `vocab_size`, without the latter.

    The lowest hundredth and the highest tenth of a vocabulary are left out: that is where special
    tokens are, some of which (image placeholders) a server refuses.
    """

    first_id: int
    vocab_size: int

    @classmethod
    def within(cls, vocab_size: int) -> TokenRange:
        """The ids to draw from of a vocabulary of so many tokens."""
        return cls(vocab_size // 100, max(vocab_size // 100 + 1, vocab_size * 9 // 10))


async def find_target(
    base_url: str,
    model: str | None,
    headers: Mapping[str, str],
    ready_timeout_s: float,
) -> Target:
    """Ask the server for its models, again for `ready_timeout_s` while it is not there yet.

    Raises `TinferClientError` for a server that does not answer in time, `StartError` for what is
    no address and for a server without `model`.
    """
    try:
        base_url = server_url(base_url)
    except ValueError as error:
        raise StartError(str(error)) from error
    deadline_s = time.monotonic() + ready_timeout_s
    async with AsyncClient(
        base_url, headers=headers, timeout_s=_ASK_TIMEOUT_S, max_retries=0
    ) as client:
        while True:
            try:
                served = await client.models()
                break
            except (ConnectionFailed, RequestTimeout, ServerUnavailable):
                if time.monotonic() >= deadline_s:
                    raise
            await asyncio.sleep(_RETRY_INTERVAL_S)
        return _chosen(base_url, served, model)


def _chosen(base_url: str, served: list[Model], model: str | None) -> Target:
    names = [one.id for one in served]
    if not names:
        raise StartError(f"{base_url} serves no model")
    if model is not None and model not in names:
        raise StartError(f"{base_url} does not serve {model}, but {', '.join(names)}")
    card = served[0 if model is None else names.index(model)]
    return Target(
        base_url=base_url,
        model=card.id,
        max_model_len=card.max_model_len,
        root=card.root,
        is_tinfer=card.owned_by == "tinfer",
    )


async def scheduler_of(base_url: str) -> dict[str, Any]:
    """What a tinfer server decides by (`/debug/state`): its policies and the costs it counts with.

    Raises `StartError` where it does not say.
    """
    timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
            session.get(f"{base_url}/debug/state") as response,
        ):
            return dict((await response.json())["scheduler"])
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        raise StartError(f"{base_url}/debug/state: {type(error).__name__}: {error}") from error


def vocab_size_of(target: Target) -> tuple[int, str]:
    """The size of the model's vocabulary, and where it is known from.

    From the model's own configuration where the server names a directory of this machine; servers
    do not say it otherwise.
    """
    size = _configured(Path(target.root)) if target.root else None
    return (_UNKNOWN_VOCAB_SIZE, "assumed") if size is None else (size, "config.json")


def _configured(directory: Path) -> int | None:
    try:
        config: Any = msgspec.json.decode((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    # Models that also see or hear keep their language part in a section of its own.
    for section in (config, config.get("text_config")):
        size = section.get("vocab_size") if isinstance(section, dict) else None
        if isinstance(size, int) and size > 1:
            return size
    return None
