"""What the endpoints that generate share: what is asked, what is counted, how it is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from tinfer.api.deadline import Deadline
from tinfer.api.failures import error_body, json_response, unexpected
from tinfer.api.fanout import Batch, Fanout
from tinfer.api.render import Prompt
from tinfer.api.responses import (
    ChunkTail,
    CompletionTokensDetails,
    ErrorBody,
    PromptTokensDetails,
    Usage,
)
from tinfer.api.service import Delta, Generation, Hints, Service
from tinfer.api.sse import direct, open_stream
from tinfer.api.trace import Foretold, Predicted, Predictions, Shown, Trace, shown
from tinfer.core.sampling import SamplingSpec, TokenLogprobs
from tinfer.errors import EngineFailed, TinferError


class Job(Struct, frozen=True, kw_only=True):
    """What one request wants to see of its answers; index = prompt × n + child.

    `num_logprobs` is the number of top candidates per token, None for no logprobs.
    """

    id: str
    created: int
    model: str
    fingerprint: str | None
    prompts: list[Prompt]
    n: int
    include_usage: bool
    continuous_usage: bool
    cached_details: bool
    return_token_ids: bool
    tokens_as_ids: bool
    num_logprobs: int | None
    show_trace: bool = False
    include_prediction: bool = False
    hints: Hints = Hints()
    timeout_s: float | None = None
    trace_headers: dict[str, str] | None = None

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n


class Answer(Struct):
    """One sequence as far as it has come."""

    text: list[str] = msgspec.field(default_factory=list)
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    trace: Trace | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.trace = delta.trace


class Counter:
    """Counts tokens per answer, and makes the usage objects of one request."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cached = [0] * job.num_answers
        # Per answer, where a parser counts them.
        self.reasoning_tokens: list[int] | None = None
        # Of the answers that are over, by index.
        self.finish_reasons: dict[int, str] = {}
        self.traces: dict[int, Trace] = {}
        self._predicted: list[Predicted | None] = [None] * job.num_answers
        self.output_tokens = [0] * job.num_answers

    def add(self, index: int, delta: Delta) -> None:
        self.output_tokens[index] += len(delta.token_ids)
        self._cached[index] = max(self._cached[index], delta.cached_tokens)
        if delta.finish_reason is not None:
            self.finish_reasons[index] = delta.finish_reason
        if delta.trace is not None:
            self.traces[index] = delta.trace
            self._predicted[index] = delta.trace.prediction

    @property
    def cached_tokens(self) -> int:
        """Over the prompts, each counted once, however many answers it has."""
        return sum(self._cached[:: self._job.n])

    def total(self) -> Usage:
        """Usage of a whole response."""
        usage = self._usage(self._prompt_tokens(), sum(self.output_tokens))
        if self.reasoning_tokens is not None:
            usage.completion_tokens_details = self._details(self.reasoning_tokens)
        usage.tinfer_prediction = self._prediction()
        if self._job.cached_details:
            usage.prompt_tokens_details = PromptTokensDetails(self.cached_tokens)
        return usage

    def streamed_total(self) -> Usage:
        """Usage at the end of a stream, where nulls are left out."""
        usage = self._usage(self._prompt_tokens(), sum(self.output_tokens))
        usage.tinfer_prediction = self._prediction()
        usage.completion_tokens_details = UNSET
        usage.prompt_tokens_details = UNSET
        if self.reasoning_tokens is not None:
            usage.completion_tokens_details = self._details(self.reasoning_tokens)
        if self._job.cached_details:
            usage.prompt_tokens_details = PromptTokensDetails(self.cached_tokens, UNSET, UNSET)
        return usage

    def so_far(self, index: int) -> Usage:
        """Usage of one answer and its prompt, for a chunk."""
        prompt = self._job.prompts[index // self._job.n]
        usage = self._usage(len(prompt.token_ids), self.output_tokens[index])
        usage.prompt_tokens_details = usage.completion_tokens_details = UNSET
        if self.reasoning_tokens is not None:
            usage.completion_tokens_details = self._details([self.reasoning_tokens[index]])
        return usage

    @staticmethod
    def _details(reasoning_tokens: list[int]) -> CompletionTokensDetails:
        return CompletionTokensDetails(sum(reasoning_tokens))

    def _prediction(self) -> Foretold | UnsetType:
        """On request only; nothing where the service predicts none."""
        known = [one for one in self._predicted if one is not None]
        if not self._job.include_prediction or not known:
            return UNSET
        return known[0] if len(self._predicted) == 1 else Predictions(known)

    def _prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self._job.prompts)

    @staticmethod
    def _usage(prompt_tokens: int, output_tokens: int) -> Usage:
        return Usage(prompt_tokens, prompt_tokens + output_tokens, output_tokens)


class Reply(Protocol):
    """How one endpoint writes its answers."""

    counter: Counter
    end_mark: bytes

    @property
    def job(self) -> Job: ...

    def opening(self) -> bytes:
        """Events before the first delta."""
        ...

    def event(self, index: int, delta: Delta) -> bytes:
        """The event of one delta, which the counter already knows; empty where there is nothing to
        say before the next one. Raises `ParserFailed`."""
        ...

    def closing(self) -> bytes:
        """Events after the last delta, before `end_mark`."""
        ...

    def failed(self, body: ErrorBody) -> bytes:
        """Events that end a stream that fails midway, before `end_mark`."""
        ...

    async def whole(self, answers: list[Answer]) -> Struct:
        """The body of a response that is not streamed. Raises `ParserFailed`."""
        ...


# How a request that generates is answered, for who logs it.
REPLY: web.RequestKey[Reply] = web.RequestKey("reply", Reply)


def generations(job: Job, specs: Sequence[list[SamplingSpec]]) -> list[Generation]:
    """One sequence per prompt and child, in index order; `specs` holds the children of each."""
    return [
        Generation(
            prompt_token_ids=prompt.token_ids,
            sampling=spec,
            n=len(children),
            child=child,
            hints=job.hints,
            prompt_text=prompt.text,
            response_id=job.id,
            trace_headers=job.trace_headers,
        )
        for prompt, children in zip(job.prompts, specs, strict=True)
        for child, spec in enumerate(children)
    ]


def stop_tail(job: Job, delta: Delta, usage: Usage | None) -> ChunkTail | None:
    """What a chunk carries behind its choice: usage and trace on request, the fingerprint at the
    end."""
    stamp = delta.finish_reason is not None and not job.include_usage and job.fingerprint
    trace = (delta.trace if job.show_trace else None) or UNSET
    if usage is None and not stamp and trace is UNSET:
        return None
    return ChunkTail(usage=usage or UNSET, system_fingerprint=stamp or UNSET, tinfer=trace)


def whole_trace(job: Job, answers: Sequence[Answer]) -> Shown | UnsetType:
    """What a response that is not streamed tells of how it was served: on request only."""
    return shown([said.trace for said in answers]) if job.show_trace else UNSET


def usage_tail(job: Job, counter: Counter) -> ChunkTail:
    """What the last chunk carries when usage is asked for."""
    return ChunkTail(usage=counter.streamed_total(), system_fingerprint=job.fingerprint or UNSET)


def sampled_logprobs(source: Delta | Answer) -> list[TokenLogprobs]:
    """The logprobs of the sampled tokens. Raises `EngineFailed` when some are missing."""
    logprobs = source.logprobs or []
    if len(logprobs) != len(source.token_ids):
        raise EngineFailed("the engine sent no logprobs for some tokens")
    return logprobs


async def answer(
    request: web.Request,
    service: Service,
    sequences: Sequence[Generation],
    reply: Reply,
    stream: bool,
    headers: dict[str, str],
) -> web.StreamResponse:
    """Run the sequences and send what they say; nothing of them is left running afterwards.

    Raises what fails before the first byte.
    """
    request[REPLY] = reply
    deadline = Deadline(reply.job.timeout_s)
    fanout = Fanout(service, sequences)
    async with fanout as batches:
        if stream:
            return await _stream(request, fanout, batches, reply, headers, deadline)
        answers = [Answer() for _ in sequences]
        try:
            async with deadline.scope():
                async for batch in batches:
                    for index, delta in batch:
                        reply.counter.add(index, delta)
                        answers[index].add(delta)
        except TimeoutError as error:
            raise deadline.passed() from error
        return json_response(await reply.whole(answers), headers=headers)


async def _stream(
    request: web.Request,
    fanout: Fanout,
    batches: AsyncIterator[Batch],
    reply: Reply,
    headers: dict[str, str],
    deadline: Deadline,
) -> web.StreamResponse:
    # The head waits for the first delta: what fails before it still has its own status.
    try:
        async with deadline.scope():
            first = await anext(batches)
    except TimeoutError as error:
        raise deadline.passed() from error
    response = await open_stream(request, headers)
    try:
        async with deadline.scope():
            await _write_batches(request, response, reply, fanout, first, batches)
        last = reply.closing()
    except TimeoutError:
        if _is_stalled(request):
            raise ConnectionResetError("the client does not read") from None
        last = reply.failed(error_body(deadline.passed()))
    except TinferError as error:
        last = reply.failed(error_body(error))
    except ConnectionResetError:
        raise
    except Exception as error:  # noqa: BLE001 - the status is sent, so the stream has to say it
        last = reply.failed(unexpected(error))
    await response.write(last + reply.end_mark)
    await response.write_eof()
    return response


async def _write_batches(
    request: web.Request,
    response: web.StreamResponse,
    reply: Reply,
    fanout: Fanout,
    first: Batch,
    batches: AsyncIterator[Batch],
) -> None:
    opening = reply.opening()
    try:
        events = _events(reply, first)
    except Exception:  # who reads of the failure has to know of what
        await response.write(opening)
        raise
    await response.write(opening + events)
    sink = direct(request, lambda delta: _events(reply, [(0, delta)]))
    if sink is not None:
        fanout.write_through(sink)
    async for batch in batches:
        if events := _events(reply, batch):
            await response.write(events)


def _is_stalled(request: web.Request) -> bool:
    """Cut off a client that has not taken what was written: it would not take an error either."""
    transport = request.transport
    if transport is None:
        return True
    if not transport.get_write_buffer_size():
        return False
    transport.abort()
    return True


def _events(reply: Reply, batch: Batch) -> bytes:
    events = []
    for index, delta in batch:
        reply.counter.add(index, delta)
        events.append(reply.event(index, delta))
    return b"".join(events)
