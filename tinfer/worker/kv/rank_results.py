"""One result out of the parts of a pull that the ranks of a worker did.

Every rank copies its own part of each block and ends by itself. The pull is over when all of them
have stopped, and good only if all of them were: blocks that one rank lacks are computed by all.
"""

from __future__ import annotations

import msgspec

from tinfer.worker.kv.puller import PullResult


class RankResults:
    """The parts of one pull, as they come in, one per rank."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._parts: list[PullResult] = []

    def add(self, part: PullResult) -> PullResult | None:
        """Return the whole pull's result with the last part: bytes of all ranks, the time from the
        first start to the last end, and the reason of the first part that failed."""
        self._parts.append(part)
        if len(self._parts) < self._num_ranks:
            return None
        failed = next((one for one in self._parts if not one.ok), part)
        return msgspec.structs.replace(
            failed,
            num_bytes=sum(one.num_bytes for one in self._parts),
            started_ns=min(one.started_ns for one in self._parts),
            finished_ns=max(one.finished_ns for one in self._parts),
        )
