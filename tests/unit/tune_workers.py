"""Workers in virtual time, whose steps and hand-offs take exactly what a `CostModel` says."""

from __future__ import annotations

from collections import deque

import msgspec
from msgspec import Struct

from tinfer.core.costs import CostModel
from tinfer.tuner.driver import Moment, Received
from tinfer.wire import messages as wire


class _Running(Struct):
    start: wire.Start
    prompt_tokens: int
    computed_tokens: int = 0
    output_tokens: int = 0


class SimWorker:
    """Steps like vLLM: decodes first, then prompts in order, within a step's tokens."""

    def __init__(
        self, name: str, costs: CostModel, loop_s: float, ready: wire.Ready, crowd: float
    ) -> None:
        self.name = name
        self.ready = ready
        self.now_s = 0.0
        self.budget: int | None = None
        # Others get the core for as long as each step computes, times this.
        self.crowd = crowd
        self.waited_s = 0.0
        self._costs = costs
        self._loop_s = loop_s
        self._running: list[_Running] = []
        self._num_steps = self._num_prompt_tokens = 0
        self._busy_s = 0.0

    def handle(self, message: wire.ToWorker, at_s: float) -> deque[Received]:
        """What it says at once."""
        self.now_s = max(self.now_s, at_s)
        said: deque[Received] = deque()
        match message:
            case wire.SetBudget(tokens):
                self.budget = tokens
            case wire.Start():
                tokens = len(message.prompt) // 4
                if tokens >= self.ready.max_model_len:
                    words = f"{tokens} tokens are too many"
                    refused = wire.Refused(message.request_id, words, True)
                    said.append(self._news(refused))
                elif message.kind == "decode":
                    self.now_s += self._costs.handoff_total_s(tokens)
                    done = wire.PullDone(message.request_id, True, "", 64 * tokens, 1e-4, 1e-3)
                    said.append(self._news(done))
                    said.append(self._news(self._last(message)))
                else:
                    self._running.append(_Running(message, tokens))
        return said

    def step(self) -> Received | None:
        """The news of one step; None where there is nothing to do."""
        if not self._running:
            return None
        left = self.ready.chunk_tokens
        left_prefill = left if self.budget is None else self.budget
        kv = num_decodes = num_prefill = 0
        context = 0.0
        outputs: list[wire.Output] = []
        progress: list[tuple[str, int]] = []
        for one in sorted(self._running, key=lambda one: not one.output_tokens):
            if one.output_tokens:
                num_decodes, left = num_decodes + 1, left - 1
                kv += one.prompt_tokens + one.output_tokens
            else:
                begin = one.computed_tokens
                taken = min(one.prompt_tokens - begin, left, left_prefill)
                left, left_prefill = left - taken, left_prefill - taken
                num_prefill += taken
                context += taken * (begin + taken / 2.0)
                one.computed_tokens += taken
                if one.computed_tokens < one.prompt_tokens:
                    if taken:
                        progress.append((one.start.request_id, one.computed_tokens))
                    continue
            one.output_tokens += 1
            outputs.append(self._output(one))
        self._running = [
            one for one in self._running if one.output_tokens < _wanted_tokens(one.start)
        ]
        alone_s = self._costs.step_s(num_prefill, num_decodes, kv, context) - self._loop_s
        busy_s = alone_s * (1.0 + self.crowd)
        self.waited_s += busy_s - alone_s
        self._busy_s += busy_s
        self._num_steps += 1
        self._num_prompt_tokens += num_prefill
        self.now_s += busy_s + self._loop_s
        return self._news(wire.Step(outputs, self._stats(), progress))

    def _news(self, message: wire.ToMaster) -> Received:
        return Received(Moment(self.now_s, self.waited_s), self.name, message)

    def _output(self, one: _Running) -> wire.Output:
        source = None
        if one.start.kind == "prefill":
            lease = wire.LeaseId(0, 1)
            source = wire.Source(self.name, 1, lease, one.prompt_tokens, 1, b"")
        done = one.output_tokens >= _wanted_tokens(one.start) and source is None
        return wire.Output(
            request_id=one.start.request_id,
            token_ids=[7],
            num_output_tokens=one.output_tokens,
            text="",
            text_len=0,
            finish_reason="length" if done else None,
            source=source,
        )

    def _last(self, start: wire.Start) -> wire.Step:
        output = wire.Output(start.request_id, [7], 2, "", 0, finish_reason="length")
        return wire.Step([output], self._stats())

    def _stats(self) -> wire.WorkerStats:
        return wire.WorkerStats(
            num_steps=self._num_steps,
            busy_s=self._busy_s,
            num_computed_prompt_tokens=self._num_prompt_tokens,
        )


class SimWorkers:
    """Implements `driver.Workers`. Raises `AssertionError` where a real one would wait forever."""

    def __init__(
        self, costs: CostModel, loop_s: float, ready: list[wire.Ready], crowd: float = 0.0
    ) -> None:
        names = [f"worker-{number}" for number in range(len(ready))]
        self._workers = {
            name: SimWorker(name, costs, loop_s, one, crowd)
            for name, one in zip(names, ready, strict=True)
        }
        self.ready = dict(zip(names, ready, strict=True))
        self._now_s = 0.0
        self._said: deque[Received] = deque()

    def moment(self, worker_id: str) -> Moment:
        return Moment(self._now_s, self._workers[worker_id].waited_s)

    def send(self, worker_id: str, message: wire.ToWorker) -> None:
        self._said += self._workers[worker_id].handle(message, self._now_s)
        if isinstance(message, wire.Start) and message.source is not None:
            ended = wire.LeasesEnded([message.source.lease], wire.WorkerStats())
            moment = Moment(self._now_s, 0.0)
            self._said.append(Received(moment, message.source.worker_id, ended))

    async def receive(self) -> Received:
        if not self._said:
            steps = (worker.step() for worker in self._workers.values())
            self._said += [step for step in steps if step is not None]
        assert self._said, "nobody is going to say anything"
        received = self._said.popleft()
        self._now_s = max(self._now_s, received.moment.at_s)
        return received


def _wanted_tokens(start: wire.Start) -> int:
    return 1 if start.kind == "prefill" else start.sampling.max_tokens


def ready(**changes: int) -> wire.Ready:
    """What such a worker is; its KV cache takes 64 bytes per token."""
    ready = wire.Ready(
        pid=1,
        max_model_len=8192,
        block_tokens=16,
        num_blocks=4096,
        kv_bytes=0,
        max_num_seqs=32,
        chunk_tokens=2048,
        vocab_size=512,
        transport="shm",
        device="cpu",
        dtype="bfloat16",
        engine="fake",
        export=b"",
    )
    changed = msgspec.structs.replace(ready, **changes)
    kv_bytes = changed.num_blocks * changed.block_tokens * 64
    return msgspec.structs.replace(changed, kv_bytes=kv_bytes)
