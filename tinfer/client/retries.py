"""Whether a failed attempt is made again, and after how long."""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from msgspec import Struct, field

from tinfer.client.errors import (
    ConnectionFailed,
    Overloaded,
    RequestTimeout,
    ServerUnavailable,
    TinferClientError,
)

# Source of these three: openai-python 3.52.0, the clients that users know.
BASE_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_RETRY_AFTER_S = 120.0


class Retries(Struct, kw_only=True):
    """At most `num_retries` more attempts, each wait drawn at random and twice as long as the last.

    `sleep` and `rng` are injected by tests.
    """

    num_retries: int = 2
    base_delay_s: float = BASE_DELAY_S
    rng: random.Random = field(default_factory=random.Random)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def delay_s(self, attempt: int, error: TinferClientError) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 0); None: give up.

        A server that names a time is not asked before it, and up to 10 % later, since everyone
        whom it refused at once was told the same; beyond `MAX_RETRY_AFTER_S` it is not asked again.
        """
        if attempt >= self.num_retries:
            return None
        if isinstance(error, Overloaded | ServerUnavailable):
            if error.retry_after_s is not None:
                if error.retry_after_s > MAX_RETRY_AFTER_S:
                    return None
                return error.retry_after_s * self.rng.uniform(1.0, 1.1)
        elif not _nothing_came(error):
            return None
        doubled_s = self.base_delay_s * 2.0 ** min(attempt, 16)
        return min(MAX_DELAY_S, doubled_s) * self.rng.uniform(0.5, 1.0)


def _nothing_came(error: TinferClientError) -> bool:
    if isinstance(error, RequestTimeout):
        return error.limit == "connect"
    return isinstance(error, ConnectionFailed) and error.retryable


def retry_after_s(header: str | None, now: datetime) -> float | None:
    """Seconds from `now` that a `Retry-After` header means; None where it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
