"""What a client of `/v1/responses` reads, whole or as a stream."""

from __future__ import annotations

import asyncio

import msgspec
from msgspec import UNSET, Struct

from tinfer.api.logprobs import chat_logprobs
from tinfer.api.parsing import ChatParsing, Piece, Said
from tinfer.api.reading import ParsedStream, take_apart
from tinfer.api.responses import ChatLogprobEntry, ErrorBody
from tinfer.api.responses_api.bodies import (
    ErrorCode,
    IncompleteDetails,
    Item,
    ItemStatus,
    Response,
    ResponseError,
    ResponseStatus,
    used,
)
from tinfer.api.responses_api.events import (
    Numbered,
    ResponseCompleted,
    ResponseCreated,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
)
from tinfer.api.responses_api.items import ItemWriter, call_item, message_item, reasoning_item
from tinfer.api.service import Delta
from tinfer.api.serving import Answer, Counter, Job, sampled_logprobs
from tinfer.api.trace import shown
from tinfer.errors import ParserFailed

# By finish reason, "completed" for any other.
_STATUSES: dict[str | None, ResponseStatus] = {"length": "incomplete", "abort": "cancelled"}
# By HTTP status; what is not here is the server's fault.
_CODES: dict[int, ErrorCode] = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class Manner(Struct, frozen=True, kw_only=True):
    """How one response is answered; without `parallel` it has one call at most."""

    parallel: bool = True
    hides_reasoning: bool = False
    counts_reasoning: bool = False


class ResponsesReply:
    """Writes the answer of one request; `begun` is the response before its first token."""

    end_mark = b""  # the last event says that it is the last one

    def __init__(
        self, job: Job, begun: Response, manner: Manner, parsing: ChatParsing | None
    ) -> None:
        self.job = job
        self.counter = Counter(job)
        self._begun = begun
        self._manner = manner
        self._parsing = parsing
        self._stream = ParsedStream(parsing) if parsing else None
        # Tokens that tell of reasoning are hidden with it.
        hides = parsing is not None and manner.hides_reasoning
        self._num_logprobs = None if hides else job.num_logprobs
        self._items = ItemWriter(self._num_logprobs is not None)
        self._numbered = Numbered()
        self._failure: ParserFailed | None = None
        if manner.counts_reasoning:
            self.counter.reasoning_tokens = [0]

    # --- streamed -----------------------------------------------------------------------------

    def opening(self) -> bytes:
        return self._numbered.frame([ResponseCreated(self._begun), ResponseInProgress(self._begun)])

    def event(self, index: int, delta: Delta) -> bytes:
        if self._failure is not None:  # a delta may be offered twice
            raise self._failure
        logprobs = self._logprobs(delta) or []
        try:
            return self._numbered.frame(self._items.write(self._piece(delta), logprobs))
        except ParserFailed as error:
            self._failure = error
            raise

    def _piece(self, delta: Delta) -> Piece | None:
        if self._stream is None:
            return Piece(None, delta.text, [])
        piece = self._stream.piece(delta)
        if delta.finish_reason is not None and self.counter.reasoning_tokens is not None:
            self.counter.reasoning_tokens[0] = self._stream.count_reasoning()
        if piece is not None and not self._manner.parallel:
            piece.tool_calls = [call for call in piece.tool_calls if call.index == 0]
        return piece

    def closing(self) -> bytes:
        status = self._status()
        events = self._items.close(_item_status(status))
        response = self._ended(status, self._items.so_far())
        kind = ResponseCompleted if status == "completed" else ResponseIncomplete
        return self._numbered.frame([*events, kind(response)])

    def failed(self, body: ErrorBody) -> bytes:
        response = self._ended("failed", self._items.so_far())
        response.error = ResponseError(
            code=_CODES.get(body.error.code, "server_error"),
            message=body.error.message,
            type=body.error.type,
            param=body.error.param,
        )
        return self._numbered.frame([ResponseFailed(response)])

    # --- whole --------------------------------------------------------------------------------

    async def whole(self, answers: list[Answer]) -> Response:
        (answer,) = answers
        said = Said(None, "".join(answer.text), [], 0)
        if self._parsing is not None:
            # A parser may take a while over a long answer, in which streams have to move.
            (said,) = await asyncio.to_thread(take_apart, self._parsing, answers)
        if self.counter.reasoning_tokens is not None:
            self.counter.reasoning_tokens[0] = said.reasoning_tokens
        status = self._status()
        return self._ended(status, self._whole_items(said, answer, _item_status(status)))

    def _whole_items(self, said: Said, answer: Answer, last: ItemStatus) -> list[Item]:
        items: list[Item] = []
        if said.reasoning:
            items.append(reasoning_item(said.reasoning, "completed"))
        if said.content:
            items.append(message_item(said.content, "completed", self._logprobs(answer)))
        calls = said.tool_calls if self._manner.parallel else said.tool_calls[:1]
        items += [call_item(call, "completed") for call in calls]
        if items:
            items[-1].status = last
        return items

    # --- both ---------------------------------------------------------------------------------

    def _status(self) -> ResponseStatus:
        return _STATUSES.get(self.counter.finish_reasons.get(0), "completed")

    def _ended(self, status: ResponseStatus, items: list[Item]) -> Response:
        is_short = status == "incomplete"
        traces = [self.counter.traces.get(0)]
        return msgspec.structs.replace(
            self._begun,
            status=status,
            incomplete_details=IncompleteDetails("max_output_tokens") if is_short else None,
            output=items,
            usage=used(self.counter),
            tinfer=shown(traces) if self.job.show_trace else UNSET,
        )

    def _logprobs(self, source: Delta | Answer) -> list[ChatLogprobEntry] | None:
        if self._num_logprobs is None:
            return None
        job = self.job
        return chat_logprobs(
            sampled_logprobs(source), self._num_logprobs, job.tokens_as_ids
        ).content


def _item_status(status: ResponseStatus) -> ItemStatus:
    """Of the last item; all before it are complete."""
    return "completed" if status == "completed" else "incomplete"
