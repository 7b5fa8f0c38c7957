"""A second engine, written plainly: one step at a time, every block a thing of its own.

It follows the same rules as the simulated engine and shares no code with it: no rows of steps, no
counting of blocks, requests asked one by one what they need. Slow and easy to believe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tinfer.sim.spec import EngineSpec, SimRequest

Kind = Literal["whole", "prefill", "decode"]
# What a block's content is known by: a shared hash, or the block of that number of a request.
Content = int | tuple[str, int]


@dataclass(eq=False)
class Block:
    content: Content | None = None
    num_users: int = 0


@dataclass(eq=False)
class Seq:
    """A request here. `tokens_s` are the tokens sampled here, by when."""

    request: SimRequest
    kind: Kind
    blocks: list[Block] = field(default_factory=list)
    num_noted: int = 0  # of its blocks, how many were made findable
    computed: int = 0
    tokens_s: list[float] = field(default_factory=list)
    num_preemptions: int = 0
    cached_tokens: int | None = None
    pulled_s: float = math.inf
    ended: str | None = None
    is_decoding: bool = False

    @property
    def target(self) -> int:
        return self.request.prompt_tokens + len(self.tokens_s)

    @property
    def num_wanted(self) -> int:
        return 1 if self.kind == "prefill" else self.request.output_tokens


class Reference:
    """The engine. `events` are (time, what, request id); messages are given in order of time."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.free = [Block() for _ in range(spec.num_blocks)]  # the first one is taken first
        self.waiting: list[Seq] = []
        self.pulling: list[Seq] = []
        self.ready: list[Seq] = []
        self.running: list[Seq] = []
        self.held: dict[str, Seq] = {}
        self.budget: int | None = None
        self.now_s = 0.0
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self.busy_s = 0.0
        self.events: list[tuple[float, str, str]] = []
        # What is known while a step goes on, by when it begins: totals, and blocks free meanwhile.
        self.history: list[tuple[float, tuple[int, float, int, int]]] = []

    # --- messages ---------------------------------------------------------------------------

    def start(self, seq: Seq) -> None:
        most = seq.request.prompt_tokens + seq.num_wanted - 1
        if -(-most // self.spec.block_tokens) > self.spec.num_blocks:
            self.say("refused", seq)
        else:
            self.waiting.append(seq)

    def abort(self, request_id: str) -> None:
        for queue in (self.waiting, self.pulling, self.ready, self.running):
            for seq in [one for one in queue if one.request.request_id == request_id]:
                if seq.ended:
                    continue
                self.say("aborted", seq)
                if queue is not self.pulling:
                    queue.remove(seq)
                    self.release(seq)

    def end_lease(self, request_id: str) -> None:
        seq = self.held.pop(request_id, None)
        if seq is not None:
            self.release(seq)
            self.events.append((self.now_s, "lease-ended", request_id))

    def say(self, what: str, seq: Seq) -> None:
        if what in ("aborted", "refused", "finished"):
            seq.ended = what
        self.events.append((self.now_s, what, seq.request.request_id))

    # --- blocks -----------------------------------------------------------------------------

    def content(self, seq: Seq, index: int) -> Content:
        hashes = seq.request.block_hashes
        return hashes[index] if index < len(hashes) else (seq.request.request_id, index)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.block_tokens)

    def find(self, content: Content) -> Block | None:
        taken = [block for seq in self.everywhere() for block in seq.blocks]
        return next((block for block in taken + self.free if block.content == content), None)

    def everywhere(self) -> list[Seq]:
        return [*self.pulling, *self.ready, *self.running, *self.held.values()]

    def hits(self, seq: Seq) -> list[Block]:
        found: list[Block] = []
        if not self.spec.prefix_caching:
            return found
        for index in range((seq.target - 1) // self.spec.block_tokens):
            block = self.find(self.content(seq, index))
            if block is None:
                break
            found.append(block)
        return found

    def take(self, seq: Seq, num_blocks: int) -> None:
        for _ in range(num_blocks):
            block = self.free.pop(0)
            block.content, block.num_users = None, 1
            seq.blocks.append(block)

    def adopt(self, seq: Seq, found: list[Block]) -> None:
        for block in found:
            if block in self.free:
                self.free.remove(block)
            block.num_users += 1
        seq.blocks = list(found)
        seq.num_noted = len(found)
        # What it had beyond that is computed anew: nothing leads there any more.
        for block in [b for b in self.free if isinstance(b.content, tuple)]:
            assert isinstance(block.content, tuple)
            if block.content[0] == seq.request.request_id:
                block.content = None
                self.free.remove(block)
                self.free.insert(0, block)

    def note(self, seq: Seq, tokens: int) -> None:
        """The request's shared blocks up to there can be found by others from now on."""
        if not self.spec.prefix_caching:
            return
        end = min(tokens // self.spec.block_tokens, len(seq.request.block_hashes))
        for index in range(seq.num_noted, end):
            content = self.content(seq, index)
            known = self.find(content)
            if known is not None and known.num_users:
                continue
            if known is not None:
                known.content = None
                self.free.remove(known)
                self.free.insert(0, known)
            seq.blocks[index].content = content
        seq.num_noted = max(seq.num_noted, end)

    def release(self, seq: Seq, keeps: bool = True) -> None:
        num_shared = len(seq.request.block_hashes)
        for index in reversed(range(len(seq.blocks))):
            block = seq.blocks[index]
            block.num_users -= 1
            is_whole = (index + 1) * self.spec.block_tokens <= seq.computed
            if self.spec.prefix_caching and keeps and is_whole and index >= num_shared:
                block.content = self.content(seq, index)
            if block.num_users == 0:
                self.free.insert(0 if block.content is None else len(self.free), block)
        seq.blocks, seq.computed, seq.num_noted = [], 0, 0

    # --- steps ------------------------------------------------------------------------------

    def end_pull(self) -> None:
        """The copy that ends first has ended."""
        seq = min(self.pulling, key=lambda one: one.pulled_s)
        self.pulling.remove(seq)
        self.events.append((self.now_s, "pulled", seq.request.request_id))
        if seq.ended:
            return self.release(seq, keeps=False)
        self.note(seq, seq.request.prompt_tokens)
        seq.computed -= 1
        self.ready.append(seq)

    def step(self) -> bool:
        """One step; false if there is nothing to compute."""
        spec = self.spec
        for seq in self.ready:
            seq.is_decoding = True
            self.running.append(seq)
        self.ready = []
        chunks, has_preempted = self.fit_running()
        if not (has_preempted and chunks):
            chunks += self.admit(chunks)
        totals = (self.num_steps, self.busy_s, self.num_prefill_tokens, len(self.free))
        self.history.append((self.now_s, totals))
        if not chunks:
            return False
        prompts = [(seq, num) for seq, num in chunks if not seq.is_decoding]
        decodes = [seq for seq, _ in chunks if seq.is_decoding]
        taken_s = spec.costs.step_s(
            sum(num for _, num in prompts),
            len(decodes),
            sum(seq.computed for seq in decodes),
            sum(num * (2 * seq.computed + num) / 2 for seq, num in prompts),
        )
        self.now_s += taken_s
        self.busy_s += taken_s
        self.num_steps += 1
        self.num_prefill_tokens += sum(num for _, num in prompts)
        # As the engine says it: what decodes first, then prompts.
        for seq, num in [(seq, 1) for seq in decodes] + prompts:
            seq.computed += num
            if seq.computed == seq.target:
                self.sampled(seq)
        return True

    def sampled(self, seq: Seq) -> None:
        seq.tokens_s.append(self.now_s)
        seq.is_decoding = True
        if seq.kind == "prefill" and seq.request.output_tokens > 1:
            self.running.remove(seq)
            self.held[seq.request.request_id] = seq
            self.say("prefilled", seq)
        elif len(seq.tokens_s) == seq.num_wanted:
            self.running.remove(seq)
            self.say("finished", seq)
            self.release(seq)
        elif len(seq.tokens_s) == 1 and seq.kind == "whole":
            self.say("first-token", seq)

    def fit_running(self) -> tuple[list[tuple[Seq, int]], bool]:
        has_preempted = False
        while True:
            chunks = self.running_chunks()
            needed = {seq: self.missing(seq, num) for seq, num in chunks}
            if sum(needed.values()) <= len(self.free):
                break
            victim = self.running[-1]
            if self.spec.victim == "least-progress":
                victim = min(
                    reversed(self.running),
                    key=lambda s: (
                        len(s.tokens_s),
                        s.request.prompt_tokens if s.is_decoding else s.computed,
                    ),
                )
            self.running.remove(victim)
            self.release(victim)
            victim.is_decoding = False
            victim.num_preemptions += 1
            self.waiting.insert(0, victim)
            has_preempted = True
        for seq, num in chunks:
            self.take(seq, needed[seq])
            self.note(seq, seq.computed + num)
        return chunks, has_preempted

    def missing(self, seq: Seq, num: int) -> int:
        return self.blocks_for(seq.computed + num) - len(seq.blocks)

    def running_chunks(self) -> list[tuple[Seq, int]]:
        decodes = [seq for seq in self.running if seq.is_decoding]
        left = self.prompt_tokens(len(decodes))
        chunks = [(seq, 1) for seq in decodes]
        for seq in self.running:
            num = min(left, seq.target - seq.computed)
            if not seq.is_decoding and num > 0:
                chunks.append((seq, num))
                left -= num
        return chunks

    def prompt_tokens(self, num_decodes: int) -> int:
        left = self.spec.max_num_batched_tokens - num_decodes
        return left if self.budget is None else min(left, self.budget)

    def admit(self, chunks: list[tuple[Seq, int]]) -> list[tuple[Seq, int]]:
        prompts = [(seq, num) for seq, num in chunks if not seq.is_decoding]
        left = self.prompt_tokens(len(chunks) - len(prompts)) - sum(num for _, num in prompts)
        admitted: list[tuple[Seq, int]] = []
        while len(self.running) + len(self.pulling) < self.spec.max_num_seqs:
            looked_at = [s for s in self.waiting if left > 0 or self.is_pull(s)]
            if not looked_at:
                break
            seq = looked_at[0]
            found = self.hits(seq)
            idle = sum(block in self.free for block in found)
            needed = self.blocks_for(seq.target) - len(found) + idle
            if self.is_pull(seq):
                taken = dict(prompts + admitted)
                for other in [one for one in self.running if not one.is_decoding]:
                    whole = self.blocks_for(other.target)
                    needed += whole - self.blocks_for(other.computed + taken.get(other, 0))
            if self.running:
                needed += int(self.spec.watermark * self.spec.num_blocks)
            if needed > len(self.free):
                break
            self.waiting.remove(seq)
            self.adopt(seq, found)
            missing = seq.target - len(found) * self.spec.block_tokens
            if self.is_pull(seq):
                self.take(seq, self.blocks_for(seq.target) - len(found))
                seq.computed = seq.target
                seq.pulled_s = self.now_s + self.spec.costs.handoff_total_s(missing)
                seq.cached_tokens = 0
                self.pulling.append(seq)
                continue
            num = min(left, missing)
            seq.computed = seq.target - missing
            self.take(seq, self.missing(seq, num))
            self.note(seq, seq.computed + num)
            if seq.cached_tokens is None:
                seq.cached_tokens = seq.computed
            self.running.append(seq)
            admitted.append((seq, num))
            left -= num
        return admitted

    def is_pull(self, seq: Seq) -> bool:
        return seq.kind == "decode" and seq.cached_tokens is None

    def next_pull_s(self) -> float:
        return min((seq.pulled_s for seq in self.pulling), default=math.inf)
