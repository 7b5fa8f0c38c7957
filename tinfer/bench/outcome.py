"""What the load generator is to send, and what became of it as its client saw it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field


class Planned(Struct, frozen=True, kw_only=True):
    """One request to send; `planned_s` counts from the start of the run.

    `body` is the JSON to post, made before the run so that making it is never in a latency. With
    `after`, the request is due when the one of that id has ended, but not before `planned_s`.
    """

    request_id: str
    planned_s: float
    body: bytes
    prompt_tokens: int
    output_tokens: int
    after: str | None = None


class Outcome(Struct, kw_only=True):
    """One request that was started; times in seconds from the start of the run.

    `due_s`: when it should have been sent. `sent_s`: when it was; between the two lie `queue_s`,
    the wait for a place under --max-concurrency, and `lag_s`, the delay by the client itself.
    `chunk_s`: when each event with a piece of the answer was read. `status` is None where no answer
    began. `prompt_tokens` and `output_tokens` are what the server says in its usage; where it says
    nothing (`has_usage` false), what was sent and the number of chunks.
    """

    request_id: str
    due_s: float
    prompt_tokens: int
    asked_tokens: int
    sent_s: float = 0.0
    queue_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    output_tokens: int = 0
    cached_tokens: int | None = None
    has_usage: bool = False
    finish_reason: str | None = None
    status: int | None = None
    error: str | None = None
    interrupted: bool = False
    trace: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """The whole answer came."""
        return self.error is None and not self.interrupted and bool(self.chunk_s)

    @property
    def lag_s(self) -> float:
        return self.sent_s - self.due_s - self.queue_s

    @property
    def ttft_s(self) -> float:
        """From the sending to the first piece of the answer."""
        return self.chunk_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """From the sending to the last piece of the answer; what follows it is not waited for."""
        return self.chunk_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first one; None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """The gaps between chunks: a chunk of several tokens is one gap, as in vLLM's benchmark."""
        return [
            after - before for before, after in zip(self.chunk_s, self.chunk_s[1:], strict=False)
        ]


class LoadRun(Struct, kw_only=True):
    """One run of the load generator: every request that was started, in the order of the plan.

    `duration_s` ends when the last answer has. `cpu_s` is processor time of this process in it.
    `num_not_sent` counts what an interruption left unsent.
    """

    outcomes: list[Outcome]
    duration_s: float
    cpu_s: float
    interrupted: bool = False
    num_not_sent: int = 0
