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
    number: int = 0  # of those that came, which
    is_decoding: bool = False
    has_source: bool = False  # whether it is to begin with a pull

    @property
    def target(self) -> int:
        return self.request.prompt_tokens + len(self.tokens_s)

    @property
    def num_wanted(self) -> int:
        return 1 if self.kind == "prefill" else self.request.output_tokens


class Reference:
    """The engine. `events` are (time, what, request id); messages are given in order of time.

    With `parks`, who lost its blocks is in `parked` until `resume`. `lost` says who did, in order.
    """

    def __init__(self, spec: EngineSpec, parks: bool = False) -> None:
        self.spec = spec
        self.parks = parks
        self.parked: list[Seq] = []
        self.lost: list[str] = []
        self.free = [Block() for _ in range(spec.num_blocks)]  # the first one is taken first
        self.waiting: list[Seq] = []
        self.pulling: list[Seq] = []
        self.ready: list[Seq] = []
        self.running: list[Seq] = []
        self.held: dict[str, Seq] = {}
        self.num_started = 0
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
        self.num_started += 1
        seq.number = self.num_started
        seq.has_source = seq.kind == "decode"
        most = seq.request.prompt_tokens + seq.num_wanted - 1
        if -(-most // self.spec.block_tokens) > self.spec.num_blocks:
            self.say("refused", seq)
        else:
            self.waiting.append(seq)

    def abort(self, request_id: str) -> None:
        for queue in (self.waiting, self.pulling, self.ready, self.running, self.parked):
            for seq in [one for one in queue if one.request.request_id == request_id]:
                if seq.ended:
                    continue
                self.say("aborted", seq)
                if queue is not self.pulling:
                    queue.remove(seq)
                    self.release(seq)

    def resume(self, request_id: str, has_source: bool) -> None:
        for seq in [one for one in self.parked if one.request.request_id == request_id]:
            self.parked.remove(seq)
            seq.has_source = has_source
            self.waiting.insert(0, seq)

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
        for seq in self.ready:
            seq.is_decoding = seq.kind == "decode" or bool(seq.tokens_s)
            self.running.append(seq)
        self.ready = []
        chunks = self.fill(lets_in=self.fit_running())
        totals = (self.num_steps, self.busy_s, self.num_prefill_tokens, len(self.free))
        self.history.append((self.now_s, totals))
        if not chunks:
            return False
        prompts = [(seq, num) for seq, num in chunks if not seq.is_decoding]
        decodes = [seq for seq, _ in chunks if seq.is_decoding]
        taken_s = self.step_s(prompts, decodes)
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

    def step_s(self, prompts: list[tuple[Seq, int]], decodes: list[Seq]) -> float:
        costs, longer = self.spec.costs, 1 + self.spec.prefill_tax
        num_tokens = sum(num for _, num in prompts)
        if self.spec.pads_chunks and not decodes:
            num_tokens = self.spec.max_num_batched_tokens
        looked_at = sum(num * (2 * seq.computed + num) / 2 for seq, num in prompts)
        prompts_s = costs.prefill_token_s * num_tokens + costs.prefill_context_s * looked_at
        if not decodes:
            return longer * (costs.base_s + prompts_s)
        kv_tokens = sum(seq.computed for seq in decodes)
        decodes_s = costs.decode_seq_s * len(decodes) + costs.kv_token_s * kv_tokens
        return costs.base_s + decodes_s + longer * prompts_s

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

    def fit_running(self) -> bool:
        """Preempt until the next step of what runs has its blocks. Returns whether others may be
        let into that step."""
        has_preempted = False
        while True:
            chunks = self.running_chunks()
            if sum(self.missing(seq, num) for seq, num in chunks) <= len(self.free):
                return not (has_preempted and chunks)
            victim = self.running[-1]
            if self.spec.victim == "least-progress":
                victim = min(self.running, key=lambda seq: (len(seq.tokens_s), -seq.number))
            self.running.remove(victim)
            self.release(victim)
            victim.is_decoding = False
            victim.num_preemptions += 1
            self.lost.append(victim.request.request_id)
            if self.parks:
                self.parked.append(victim)
            else:
                self.waiting.insert(0, victim)
            has_preempted = True

    def missing(self, seq: Seq, num: int) -> int:
        return self.blocks_for(seq.computed + num) - len(seq.blocks)

    def running_chunks(self) -> list[tuple[Seq, int]]:
        decodes = [seq for seq in self.running if seq.is_decoding]
        prompts = [seq for seq in self.running if not seq.is_decoding]
        left = self.prompt_tokens(len(decodes))
        return [(seq, 1) for seq in decodes] + self.shares(prompts, left)

    def shares(self, prompts: list[Seq], left: int) -> list[tuple[Seq, int]]:
        """What prompts that run get of so many tokens."""
        todo, chunks = list(prompts), []
        while todo and left > 0:
            seq = self.first_of(todo)
            todo.remove(seq)
            chunks.append((seq, min(left, self.tokens_left(seq))))
            left -= chunks[-1][1]
        return chunks

    def first_of(self, seqs: list[Seq]) -> Seq:
        if self.spec.prefill_order == "fcfs":
            return seqs[0]
        return min(seqs, key=lambda seq: (self.tokens_left(seq), seq.number))

    def tokens_left(self, seq: Seq) -> int:
        if seq in self.running:
            return seq.target - seq.computed
        return seq.target - len(self.hits(seq)) * self.spec.block_tokens

    def prompt_tokens(self, num_decodes: int) -> int:
        left = self.spec.max_num_batched_tokens - num_decodes
        return left if self.budget is None else min(left, self.budget)

    def fill(self, lets_in: bool) -> list[tuple[Seq, int]]:
        """What the step computes, in order; all of it has its blocks then."""
        chunks = [(seq, 1) for seq in self.running if seq.is_decoding]
        for seq, _ in chunks:
            self.take(seq, self.missing(seq, 1))
        left = self.prompt_tokens(len(chunks))
        todo = [seq for seq in self.running if not seq.is_decoding]
        while True:
            has_seat = len(self.running) + len(self.pulling) < self.spec.max_num_seqs
            turn = self.next_up(todo, self.waiting if lets_in and has_seat else [], left)
            if turn is None:
                return chunks
            if turn in todo:
                todo.remove(turn)
            elif not self.let_in(turn, todo, left):
                lets_in = False
                continue
            num = 0 if turn in self.pulling else min(left, turn.target - turn.computed)
            if num > 0:
                self.take(turn, self.missing(turn, num))
                self.note(turn, turn.computed + num)
                chunks.append((turn, num))
                left -= num

    def next_up(self, todo: list[Seq], waiting: list[Seq], left: int) -> Seq | None:
        """Whose turn it is: of prompts that run (`todo`) and of all that may be let in."""
        prompts = [seq for seq in waiting if not seq.has_source] if left > 0 else []
        pulls = [seq for seq in waiting if seq.has_source]
        if todo and self.first_of(todo + prompts) in todo:
            return self.first_of(todo)
        turns = pulls[:1] + ([self.first_of(prompts)] if prompts else [])
        return min(turns, key=waiting.index, default=None)

    def let_in(self, seq: Seq, todo: list[Seq], left: int) -> bool:
        """False if there are not the blocks for all of it."""
        found = self.hits(seq)
        needed = self.blocks_for(seq.target) - sum(block not in self.free for block in found)
        missing = seq.target - len(found) * self.spec.block_tokens
        if seq.has_source:
            for other in [one for one in self.running if not one.is_decoding]:
                needed += self.blocks_for(other.target) - len(other.blocks)
        else:
            for other, num in self.shares(todo, left - min(left, missing)):
                needed += self.missing(other, num)
        if self.running:
            needed += int(self.spec.watermark * self.spec.num_blocks)
        if needed > len(self.free):
            return False
        self.waiting.remove(seq)
        self.adopt(seq, found)
        if seq.has_source:
            self.take(seq, self.blocks_for(seq.target) - len(found))
            seq.computed = seq.target
            seq.pulled_s = self.now_s + self.spec.costs.handoff_total_s(missing)
            seq.cached_tokens = seq.cached_tokens or 0
            seq.has_source = False
            self.pulling.append(seq)
            return True
        seq.computed = seq.target - missing
        if seq.cached_tokens is None:
            seq.cached_tokens = seq.computed
        self.running.append(seq)
        return True

    def next_pull_s(self) -> float:
        return min((seq.pulled_s for seq in self.pulling), default=math.inf)
