"""API keys, kept as digests: the text of a key goes no further than where it was read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


class ApiKeys:
    """The keys of which a request must show one; without any every request is admitted."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple({_digest(key): None for key in keys})

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self)} API keys>"

    def admit(self, authorization: str | None) -> bool:
        """Whether a request with this header shows one of the keys, as `Bearer KEY`.

        How long that takes depends on nothing but the number of keys and the header's length.
        """
        if not self._digests:
            return True
        scheme, _, shown = (authorization or "").partition(" ")
        digest = _digest(shown.strip())
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(same) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    # A header may hold bytes that are no text, which come as surrogates.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
