"""From a workload's requests to simulated ones: lengths as they are, prefixes as block hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

from tinfer.predict.features import features_of_segments
from tinfer.sim.spec import SimRequest
from tinfer.workloads import Request, Segment

HASH_BYTES = 8

# What one block holds: (seed, first token of that seed's row, number of tokens), in order.
Content = tuple[tuple[str, int, int], ...]


def sim_requests(
    requests: Sequence[Request], block_tokens: int, max_output_tokens: int | None = None
) -> tuple[SimRequest, ...]:
    """The requests of a run, in the same order.

    `max_output_tokens` is what clients allow; None: exactly the answer's length, which is how the
    load generator asks (a predictor that goes by the maximum then knows every length). An answer is
    never cut.

    Block hashes are chained, one per whole block, and follow from the segments alone. They end
    where the first segment begins that no other request has: what lies behind it could never be
    found again, so it is left out of caches and indexes. A predictor that learns sees as much of a
    prompt as a server's does: not whose it is, but what it begins with and which ones are alike.
    """
    hasher = _Hasher()
    num_users = Counter(seed for one in requests for seed in {part.seed for part in one.segments})
    return tuple(
        SimRequest(
            request_id=one.request_id,
            arrival_s=one.arrival_s,
            prompt_tokens=one.prompt_tokens,
            output_tokens=one.output_tokens,
            max_output_tokens=max(one.output_tokens, max_output_tokens or 0),
            task=one.task,
            block_hashes=hasher.chain(_shared(one.segments, num_users), block_tokens),
            features=features_of_segments(one.segments),
        )
        for one in requests
    )


def _shared(segments: Sequence[Segment], num_users: Counter[str]) -> Iterator[Segment]:
    """The leading segments that some other request has too."""
    for segment in segments:
        if num_users[segment.seed] < 2:
            return
        yield segment


class _Hasher:
    """Chained block hashes; blocks that were met before are looked up."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Content], int] = {}

    def chain(self, segments: Iterator[Segment], block_tokens: int) -> tuple[int, ...]:
        """One hash per whole block of these segments."""
        hashes: list[int] = []
        parent = 0
        for content in _blocks(segments, block_tokens):
            key = (parent, content)
            if key not in self._known:
                digest = hashlib.blake2b(repr(key).encode(), digest_size=HASH_BYTES).digest()
                # 63 bits: a positive integer of every encoding.
                self._known[key] = int.from_bytes(digest) >> 1
            parent = self._known[key]
            hashes.append(parent)
        return tuple(hashes)


def _blocks(segments: Iterator[Segment], block_tokens: int) -> Iterator[Content]:
    """What each whole block holds."""
    content: list[tuple[str, int, int]] = []
    missing = block_tokens
    for seed, num_tokens in segments:
        first = 0
        while first < num_tokens:
            num = min(missing, num_tokens - first)
            content.append((seed, first, num))
            first += num
            missing -= num
            if not missing:
                yield tuple(content)
                content, missing = [], block_tokens
