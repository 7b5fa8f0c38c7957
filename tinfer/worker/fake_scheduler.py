"""The fake engine's scheduler: vLLM's in small.

First come, first served, or of the prompts the one with the fewest tokens left; a token budget per
step, and within it one for prompts; prompts in chunks; blocks as they are needed, and the running
request with the least progress preempted when there are none: it waits until it is told how to go
on. A request with a source gets all blocks for it at once and stands aside until they are filled.
Its rules are those of `engine_scheduler`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from tinfer.wire.messages import Source, Start
from tinfer.worker.adapter import Report
from tinfer.worker.fake_kv import FakeKV
from tinfer.worker.fake_model import TOKEN_BYTES, Answer
from tinfer.worker.fake_settings import FakeLimits


class FakeRequest:
    """A request on its way through the engine. `source` is set until its pull is submitted or it
    is let go of."""

    __slots__ = (
        "answer",
        "blocks",
        "is_aborted",
        "is_pulling",
        "num_computed",
        "num_pulled",
        "num_tokens",
        "number",
        "prompt_tokens",
        "source",
        "start",
        "text_len",
    )

    def __init__(self, start: Start, answer: Answer) -> None:
        self.start = start
        self.answer = answer
        self.number = 0  # in order of arrival
        self.prompt_tokens = len(start.prompt) // TOKEN_BYTES
        self.num_tokens = self.prompt_tokens  # prompt and answer
        self.num_computed = 0  # of these, how many have their KV here
        self.num_pulled = 0  # of these, how many the source has or had
        self.source: Source | None = None
        self.blocks: list[int] = []
        self.text_len = 0
        self.is_pulling = False
        self.is_aborted = False

    def offer(self, source: Source | None, block_tokens: int) -> bool:
        """Whether it will pull from this source: if that has anything worth a copy, which is all
        tokens, or, where it is of another length, those in whole blocks, since a block's digest
        covers all tokens in it."""
        self.num_pulled = 0
        if source is not None:
            self.num_pulled = min(source.num_tokens, self.num_tokens)
            if source.num_tokens != self.num_tokens:
                self.num_pulled -= self.num_pulled % block_tokens
        self.source = source if self.num_pulled else None
        return self.source is not None

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def needs_one_token(self) -> bool:
        """Whether it decodes, or has been pulled but for its last token."""
        return self.num_left == 1 and (self.answer.num_tokens > 0 or self.num_pulled > 0)


class Scheduled(list[tuple[FakeRequest, int]]):
    """The requests of one step, each with how many tokens it computes.

    `num_prompt_tokens` are those under the prefill budget, `prompt_tokens_left` what it has left;
    `grants` are at most what each prompt gets of it, None where the first one takes what it can.
    """

    def __init__(self, tokens: int, prompt_tokens: int) -> None:
        super().__init__()
        self.grants: dict[FakeRequest, int] | None = None
        self.tokens_left = tokens
        self.prompt_tokens_left = prompt_tokens
        self.num_prompt_tokens = 0
        self.num_decoding = 0

    def share(self, request: FakeRequest) -> int:
        """How many tokens a request can still get."""
        if request.needs_one_token:
            return min(1, self.tokens_left)
        num_tokens = min(request.num_left, self.tokens_left, self.prompt_tokens_left)
        return num_tokens if self.grants is None else min(num_tokens, self.grants.get(request, 0))

    def put(self, request: FakeRequest, num_tokens: int) -> None:
        self.append((request, num_tokens))
        self.tokens_left -= num_tokens
        if request.needs_one_token:
            self.num_decoding += 1
        else:
            self.num_prompt_tokens += num_tokens
            self.prompt_tokens_left -= num_tokens


class FakeScheduler:
    """Every request here is in exactly one of `running`, `ready`, `waiting` and `parked`, or
    pulling; `parked`, by id, has those that were preempted and wait for `resume`."""

    def __init__(
        self,
        kv: FakeKV,
        block_tokens: int,
        limits: FakeLimits,
        prefill_order: Literal["fcfs", "srpt"] = "fcfs",
    ) -> None:
        self._kv = kv
        self._block_tokens = block_tokens
        self._limits = limits
        self._shortest_first = prefill_order == "srpt"
        # Blocks in use and requests running when each was granted tokens and did not get in.
        self._turned_away: dict[FakeRequest, tuple[int, int]] = {}
        self.parked: dict[str, FakeRequest] = {}
        self.running: list[FakeRequest] = []
        self.waiting: deque[FakeRequest] = deque()
        # Pulled, and not run yet. They own the blocks of their prompt, so they go first: nobody
        # behind them could get those.
        self.ready: deque[FakeRequest] = deque()
        self.num_pulling = 0
        self.num_preemptions = 0
        # Prompt tokens per step; None: as many as fit.
        self.prefill_budget: int | None = None
        self._num_added = 0
        self._progress: list[tuple[str, int]] = []
        self._preempted: list[str] = []

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.ready) + self.num_pulling + len(self.parked)

    def has_requests(self) -> bool:
        """Whether a step could do anything: it cannot for those that are parked."""
        return bool(self.running or self.num_waiting > len(self.parked))

    def add(self, request: FakeRequest) -> None:
        """A request that has just come."""
        self._num_added += 1
        request.number = self._num_added
        self.waiting.append(request)

    def resume(self, request: FakeRequest) -> None:
        """A parked request goes on, before all that wait: by a pull if it has a source."""
        del self.parked[request.start.request_id]
        self.waiting.appendleft(request)

    def take_report(self) -> Report:
        """What happened since the last call that no output tells."""
        report = Report(self._progress, self._preempted)
        self._progress, self._preempted = [], []
        return report

    def schedule(self) -> tuple[Scheduled, list[tuple[FakeRequest, Source]]]:
        """The next step's requests, and those whose pull is to start."""
        # The last one is the victim: the least of the answer, then the youngest.
        self.running.sort(key=lambda request: (-request.answer.num_tokens, request.number))
        step = Scheduled(self._limits.max_num_batched_tokens, self._prefill_room_tokens())
        if self._shortest_first:
            step.grants = self._granted(step.prompt_tokens_left)
        num_before = self.num_preemptions
        self._schedule_running(step)
        pulls: list[tuple[FakeRequest, Source]] = []
        if self.num_preemptions == num_before:
            self._admit(self.ready, step)
            pulls = self._admit(self.waiting, step)
        if step.grants is not None:
            taken = self._taken()
            self._turned_away = {
                one: taken if step.grants.get(one) else self._turned_away[one]
                for one in self.waiting
                if step.grants.get(one) or one in self._turned_away
            }
        return step, pulls

    def computed(self, request: FakeRequest, end: int) -> None:
        """A step has computed the tokens of a request up to `end`."""
        request.num_computed = end
        if request.num_left:
            computed_tokens = min(end, request.prompt_tokens)
            self._progress.append((request.start.request_id, computed_tokens))

    def _prefill_room_tokens(self) -> int:
        """The budget, as far as a step has room for it beside what must not wait: one token for
        each sequence that decodes or has been pulled, and one so that pulls come to start."""
        owed = sum(request.needs_one_token for request in self.running) + len(self.ready)
        starting = any(request.source is not None for request in self.waiting)
        room = max(0, self._limits.max_num_batched_tokens - owed - starting)
        return room if self.prefill_budget is None else min(room, self.prefill_budget)

    def _granted(self, left_tokens: int) -> dict[FakeRequest, int]:
        """The step's prompt tokens by request, the one with the fewest left first; but who was
        granted some before and did not get in lacks blocks or a seat, and comes last until there
        are more of them. Two of those taking turns would starve one that runs, and has them."""
        waiting = [one for one in (*self.ready, *self.waiting) if one.source is None]
        prompts = [one for one in (*self.running, *waiting) if not one.needs_one_token]
        prompts.sort(key=lambda one: (self._is_turned_away(one), one.num_left, one.number))
        grants = {}
        for request in prompts:
            grants[request] = min(left_tokens, request.num_left)
            left_tokens -= grants[request]
        return grants

    def _taken(self) -> tuple[int, int]:
        return self._kv.num_used, len(self.running)

    def _is_turned_away(self, request: FakeRequest) -> bool:
        """Whether what it lacked when it was turned away is still not there."""
        then = self._turned_away.get(request)
        return then is not None and all(
            now >= before for now, before in zip(self._taken(), then, strict=True)
        )

    def _schedule_running(self, step: Scheduled) -> None:
        index = 0
        while index < len(self.running) and step.tokens_left:
            request = self.running[index]
            num_tokens = step.share(request)
            if num_tokens:
                if not self._grow_or_preempt(request, num_tokens):
                    break
                step.put(request, num_tokens)
            index += 1

    def _admit(
        self, queue: deque[FakeRequest], step: Scheduled
    ) -> list[tuple[FakeRequest, Source]]:
        """Take requests from the head of a queue until one does not fit; returns those whose pull
        is to start. A prompt that no budget is left for lets the others pass."""
        pulls: list[tuple[FakeRequest, Source]] = []
        passed: list[FakeRequest] = []
        while queue and step.tokens_left and len(self.running) < self._limits.max_num_seqs:
            request = queue[0]
            if request.source is not None:
                if not self._grow(request, request.num_pulled):
                    break
                pulls.append((queue.popleft(), request.source))
                request.source = None
                request.is_pulling = True
                self.num_pulling += 1
                continue
            num_tokens = step.share(request)
            if not num_tokens:
                passed.append(queue.popleft())
                continue
            if not self._grow(request, request.num_computed + num_tokens):
                break
            self.running.append(queue.popleft())
            step.put(request, num_tokens)
        queue.extendleft(reversed(passed))
        return pulls

    def pull_ended(self, request: FakeRequest, num_computed: int) -> None:
        """A pull is over, and the KV of the first `num_computed` tokens is here."""
        request.is_pulling = False
        if request.is_aborted:
            self._give_up_blocks(request)
            return
        self.num_pulling -= 1
        request.num_computed = num_computed
        self.ready.append(request)

    def remove(self, request: FakeRequest) -> None:
        """Forget a request; blocks that a pull still writes to are freed when that ends."""
        if request.is_pulling:
            request.is_aborted = True
            self.num_pulling -= 1
            return
        self.parked.pop(request.start.request_id, None)
        for queue in (self.running, self.ready, self.waiting):
            if request in queue:
                queue.remove(request)
        self._give_up_blocks(request)

    def finish(self, request: FakeRequest, keep_blocks: bool) -> None:
        """A running request is over; kept blocks have a new owner."""
        self.running.remove(request)
        if not keep_blocks:
            self._give_up_blocks(request)

    def write_prompt(self, request: FakeRequest, end: int, digests: Sequence[bytes]) -> None:
        """Write the prompt blocks that are complete once tokens up to `end` are computed."""
        end = min(end, request.prompt_tokens)
        is_whole = end == request.prompt_tokens
        size = self._block_tokens
        first, last = request.num_computed // size, -(-end // size) if is_whole else end // size
        for index in range(first, last):
            self._kv.write(request.blocks[index], digests[index])

    def _grow_or_preempt(self, request: FakeRequest, num_tokens: int) -> bool:
        while not self._grow(request, request.num_computed + num_tokens):
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _grow(self, request: FakeRequest, num_tokens: int) -> bool:
        """Give a request the blocks for its first `num_tokens` tokens."""
        missing = -(-num_tokens // self._block_tokens) - len(request.blocks)
        if missing <= 0:
            return True
        blocks = self._kv.allocate(missing)
        if blocks is None:
            return False
        request.blocks += blocks
        return True

    def _preempt(self, request: FakeRequest) -> None:
        self._give_up_blocks(request)
        request.num_computed = 0
        self.num_preemptions += 1
        self._preempted.append(request.start.request_id)
        self.parked[request.start.request_id] = request

    def _give_up_blocks(self, request: FakeRequest) -> None:
        self._kv.free(request.blocks)
        request.blocks = []
