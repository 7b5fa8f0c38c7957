"""What the HTTP layer needs from the master: submit one sequence, read its stream, cancel it.

The master implements `Service`; tests of the API implement it with canned streams.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal, Protocol

from msgspec import Struct
from prometheus_client import CollectorRegistry

from tinfer.api.trace import Trace
from tinfer.core.sampling import SamplingSpec, TokenLogprobs
from tinfer.core.types import Role, Route


class Hints(Struct, frozen=True):
    """What a client says of its request beside what is to be generated.

    `expected_output_tokens`, at least 1, is how long it thinks the answer will be; of two that wait
    the one of lower `priority` starts first; `deadline_s` is how long the answer may take, to which
    the API sees.
    """

    expected_output_tokens: int | None = None
    priority: int = 0
    deadline_s: float | None = None


class Generation(Struct, frozen=True):
    """One sequence to generate: a prompt as token ids and how to sample its answer, which is number
    `child` of the `n` answers that its client wants to this prompt.

    `prompt_text` is what was tokenised, where the prompt came as text, and `response_id` the id of
    the response that the answer goes into: for the request log. `trace_headers` are the W3C trace
    context that its client sent, `traceparent` and `tracestate`.
    """

    prompt_token_ids: list[int]
    sampling: SamplingSpec
    route: Route | None = None
    n: int = 1
    child: int = 0
    hints: Hints = Hints()
    prompt_text: str | None = None
    response_id: str = ""
    trace_headers: dict[str, str] | None = None


class Delta(Struct):
    """What is new on a stream since the last delta; several engine steps merge when the reader is
    behind. `logprobs` has one entry per token of `token_ids` when asked for, else it is None.

    The last delta of a stream has a `finish_reason` and a `trace`. `prompt_logprobs` comes once,
    with the first delta; `cached_tokens` is the number of prompt tokens that no worker computed for
    this request. `seams` are the characters and tokens at which each but the first of what merged
    begins, for those who have to read step by step.
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    trace: Trace | None = None
    seams: list[tuple[int, int]] | None = None


# Whether it has taken the delta; one that it has not stays in its stream.
Sink = Callable[[Delta], bool]


class Stream(Protocol):
    """One running request. Iterate it to the end, or cancel it; cancel after the end is a no-op."""

    @property
    def request_id(self) -> str: ...

    def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas in order. Raises `ServerError` when the request fails midway."""
        ...

    def write_through(self, sink: Sink) -> None:
        """From now on, offer each delta to `sink` as it comes, and leave to the iteration what that
        does not take and the last one. No delta is offered while an earlier one is not read."""
        ...

    def cancel(self) -> None:
        """Stop the request on every worker at once; never blocks, never raises."""
        ...


class ModelCard(Struct, frozen=True):
    """What `/v1/models` and validation say of the served model."""

    names: tuple[str, ...]
    root: str
    max_model_len: int
    vocab_size: int
    created_s: int


class Service(Protocol):
    """The master as the API sees it."""

    @property
    def model(self) -> ModelCard: ...

    @property
    def registry(self) -> CollectorRegistry:
        """What `/metrics` shows; collected on the loop."""
        ...

    def submit(self, generation: Generation) -> Stream:
        """Accept a sequence. Raises `Overloaded` or `NoWorker` when it cannot be taken."""
        ...

    def healthy(self) -> tuple[bool, str]:
        """Whether requests can be served now, and one word why: `ok`, `starting`, `draining`, …"""
        ...

    def ledger(self) -> dict[str, Any]:
        """What is open right now: the body of `/debug/ledger`."""
        ...

    def state(self) -> dict[str, Any]:
        """Workers and requests by phase: the body of `/debug/state`."""
        ...

    def trace(self, seconds: float, request_id: str | None) -> Iterator[list[dict[str, Any]]]:
        """What the last `seconds` saw, of all or of one request, as Chrome trace events in batches
        that are made as they are taken. Raises `RequestNotFound`, at once."""
        ...

    def drain(self, worker_id: str, timeout_s: float) -> None:
        """Stop a worker once it is empty, or that time is up. Raises `InvalidRequest`."""
        ...

    def restart(self, worker_id: str, timeout_s: float) -> None:
        """The same, and start it anew. Raises `InvalidRequest`."""
        ...

    def ask_role(self, worker_id: str, role: Role) -> None:
        """Have a worker change its role once it has drained. Raises `InvalidRequest`."""
        ...
