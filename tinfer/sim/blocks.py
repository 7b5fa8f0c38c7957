"""An engine's KV blocks: how many are taken, and which free ones still hold a known prefix.

Blocks are counted, not numbered. Blocks with a hash are shared and counted once per hash; a free
one keeps its content until it is taken, the one freed longest ago first. Whole blocks of a request
that nobody can share stay findable as one *chain*, for the request itself: after a preemption it
finds what has not been taken since. Within a request the tail is taken first, as in vLLM.
"""

from __future__ import annotations

from tinfer.sim.jobs import Job


class BlockPool:
    """Blocks of `block_tokens` tokens. `num_free` counts those that still hold a prefix too."""

    def __init__(self, num_blocks: int, block_tokens: int, caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.caching = caching
        self.num_free = num_blocks
        self._refs: dict[int, int] = {}
        # Free blocks with content by hash, and chains by request id, in the order of their freeing.
        self._idle: dict[int | str, int] = {}
        self._num_idle = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, num_blocks: int) -> None:
        """Take free blocks, the ones without content first; there must be as many."""
        assert 0 <= num_blocks <= self.num_free, "more blocks than there are"
        self.num_free -= num_blocks
        while self._num_idle > self.num_free:
            key = next(iter(self._idle))
            num_evicted = min(self._idle[key], self._num_idle - self.num_free)
            self._num_idle -= num_evicted
            if num_evicted == self._idle[key]:
                del self._idle[key]
            else:
                self._idle[key] -= num_evicted

    def give(self, num_blocks: int) -> None:
        """Return blocks without content."""
        self.num_free += num_blocks

    def hits(self, job: Job) -> tuple[int, int]:
        """Whole blocks that the job would find, and how many of those are free; never all tokens:
        the last one is computed to have something to sample from."""
        if not self.caching:
            return 0, 0
        most = (job.target - 1) // self.block_tokens
        num_hits = num_idle = 0
        hashes = job.ticket.request.block_hashes
        for block_hash in hashes[:most]:
            if block_hash in self._idle:
                num_idle += 1
            elif block_hash not in self._refs:
                return num_hits, num_idle
            num_hits += 1
        chain = min(self._idle.get(job.request_id, 0), most - num_hits)
        return num_hits + chain, num_idle + chain

    def acquire(self, job: Job, num_hits: int) -> None:
        """Take the first `num_hits` blocks of what `hits` found."""
        hashes = job.ticket.request.block_hashes[:num_hits]
        for block_hash in hashes:
            if self._idle.pop(block_hash, 0):
                self._num_idle -= 1
                self.num_free -= 1
            self._refs[block_hash] = self._refs.get(block_hash, 0) + 1
        job.refs = list(hashes)
        job.num_registered = len(hashes)
        # What a chain holds beyond is computed anew, so nothing leads to it any more.
        self._num_idle -= self._idle.pop(job.request_id, 0)
        self.num_free -= num_hits - len(hashes)

    def register(self, job: Job, computed_tokens: int) -> None:
        """Make the job's whole prompt blocks up to there findable. One that another request's
        block already stands for is the job's own, and forgotten with it."""
        hashes = job.ticket.request.block_hashes
        end = min(computed_tokens // self.block_tokens, len(hashes))
        if not self.caching or job.num_registered >= end:
            return
        for block_hash in hashes[job.num_registered : end]:
            if block_hash in self._refs:
                continue
            # A free block of the same content loses its place to this one.
            self._num_idle -= self._idle.pop(block_hash, 0)
            self._refs[block_hash] = 1
            job.refs.append(block_hash)
        job.num_registered = end

    def release(self, job: Job, num_blocks: int, computed_tokens: int) -> None:
        """Free the job's `num_blocks` blocks, which hold `computed_tokens` tokens."""
        self.num_free += num_blocks - len(job.refs)
        if self.caching:
            num_own = computed_tokens // self.block_tokens - job.num_registered
            if num_own > 0:
                kept = self._idle.pop(job.request_id, 0)
                self._num_idle += max(kept, num_own) - kept
                self._idle[job.request_id] = max(kept, num_own)
        for block_hash in reversed(job.refs):
            self._refs[block_hash] -= 1
            if not self._refs[block_hash]:
                del self._refs[block_hash]
                self.num_free += 1
                self._num_idle += 1
                self._idle[block_hash] = 1
        job.refs = []
        job.num_registered = 0
