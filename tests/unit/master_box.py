"""A dispatcher with the real scheduler, whose workers say what a test makes them say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.unit.core_box import CAPACITY, PLAIN
from tinfer.api.service import Delta, Generation
from tinfer.core import events
from tinfer.core.sampling import SamplingSpec
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Capacity, Role, SchedulerConfig
from tinfer.errors import TinferError
from tinfer.master.loop import Dispatcher
from tinfer.master.streams import RequestStream
from tinfer.predict.asked import Predictor
from tinfer.predict.predictors import MaxTokens
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation

LEASE_TTL_S = 7.0
P, D = Incarnation("p", 0), Incarnation("d", 0)
STATS = wire.WorkerStats()


def total(deltas: list[Delta]) -> dict[str, Any]:
    """What deltas add up to, for the client."""
    return {
        "text": "".join(delta.text for delta in deltas),
        "token_ids": [token for delta in deltas for token in delta.token_ids],
        "logprobs": [entry for delta in deltas for entry in delta.logprobs or ()],
        "prompt_logprobs": next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), None),
        "finish": [d.finish_reason for d in deltas if d.finish_reason is not None],
        "stop_reason": deltas[-1].stop_reason if deltas else None,
        "cached_tokens": max((delta.cached_tokens for delta in deltas), default=0),
    }


@dataclass
class Reader:
    """The client of one stream."""

    stream: RequestStream
    deltas: list[Delta] = field(default_factory=list)
    error: TinferError | None = None

    async def run(self) -> None:
        """Read to the end."""
        try:
            async for delta in self.stream:
                self.deltas.append(delta)
        except TinferError as error:
            self.error = error

    @property
    def total(self) -> dict[str, Any]:
        return total(self.deltas)


async def read(stream: RequestStream) -> Reader:
    """A stream that has ended, read."""
    assert stream.ended, "the stream has not ended"
    reader = Reader(stream)
    await reader.run()
    return reader


class StillClock:
    """Time that stands."""

    def now_s(self) -> float:
        return 0.0


class DispatcherBox:
    """A dispatcher and shorthand for what its workers say; `sent` is what they were told."""

    def __init__(
        self,
        roles: str = "p d",
        capacity: Capacity = CAPACITY,
        predictor: Predictor | None = None,
        **config: Any,
    ) -> None:
        self.sent: list[tuple[Incarnation, wire.ToWorker]] = []
        self.scheduler = Scheduler(SchedulerConfig(**PLAIN | config))
        self.capacity = capacity
        self.dispatcher = Dispatcher(
            self.scheduler,
            lambda to, message: self.sent.append((to, message)),
            StillClock(),
            LEASE_TTL_S,
            predictor or MaxTokens(),
            "m",
        )
        for worker_id in roles.split():
            self.up(Incarnation(worker_id, 0))

    def up(self, worker: Incarnation) -> None:
        role = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}[worker.worker_id[0]]
        self.dispatcher.worker_event(events.WorkerExpected(worker.worker_id, role))
        self.dispatcher.worker_event(events.WorkerUp(*worker, role, self.capacity))

    def down(self, worker: Incarnation) -> None:
        self.dispatcher.worker_event(events.WorkerDown(*worker))

    def submit(self, request_id: str = "r", num_prompt: int = 20, **sampling: Any) -> RequestStream:
        spec = SamplingSpec(**{"max_tokens": 8, **sampling})
        return self.dispatcher.submit(request_id, Generation(list(range(num_prompt)), spec))

    def told(self) -> list[tuple[Incarnation, wire.ToWorker]]:
        """What was sent since the last look."""
        sent, self.sent = self.sent, []
        return sent

    # --- what workers say ---------------------------------------------------------------------

    def say(self, sender: Incarnation, message: wire.ToMaster) -> None:
        self.dispatcher.handle(sender, message)

    def step(
        self,
        sender: Incarnation,
        token_ids: list[int],
        num: int,
        text: str = "",
        text_len: int = 0,
        request_id: str = "r",
        **more: Any,
    ) -> None:
        output = wire.Output(request_id, token_ids, num, text, text_len, **more)
        self.say(sender, wire.Step([output], STATS))

    def prefilled(self, request_id: str = "r", slot: int = 0, token: int = 17) -> wire.Source:
        """The prefill worker emits the first token, "ab", and holds two blocks."""
        source = wire.Source("p", 0, wire.LeaseId(slot, 1), 20, 2, b"")
        self.step(P, [token], 1, "ab", 2, request_id, source=source, cached_tokens=16)
        return source

    def pulled(self, request_id: str = "r", ok: bool = True) -> None:
        self.say(D, wire.PullDone(request_id, ok, "", 0, 0.0, 0.0))

    def lease_ended(self, *slots: int) -> None:
        self.say(P, wire.LeasesEnded([wire.LeaseId(slot, 1) for slot in slots], STATS))

    def to_queued(self) -> RequestStream:
        """`r` waits behind a prompt that fills the prefill worker's budget."""
        self.submit("before", num_prompt=2 * self.capacity.chunk_tokens)
        return self.submit()

    def to_waiting(self) -> RequestStream:
        """`r` is prefilled and waits for a seat on the decode worker."""
        for slot in range(1, self.capacity.max_num_seqs + 1):
            self.submit(f"f{slot}")
            self.prefilled(f"f{slot}", slot)
        stream = self.submit()
        self.prefilled()
        return stream

    def to_decoding(self) -> RequestStream:
        stream = self.submit()
        self.prefilled()
        self.pulled()
        return stream

    # --- how it has to end --------------------------------------------------------------------

    @property
    def live(self) -> dict[str, Any]:
        """The dispatcher's own account; empty once every worker has let go of every request."""
        return dict(self.dispatcher._live)

    def assert_over(self, num_finished: int) -> None:
        assert self.live == {}
        assert self.dispatcher.num_live == 0
        assert self.dispatcher.num_finished == num_finished
        assert self.scheduler.ledger_snapshot().is_zero
