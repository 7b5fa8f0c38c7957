"""What a client of `/v1/chat/completions` reads, whole or as a stream.

Where the server has parsers, they take each answer apart into reasoning, text and tool calls; what
ends an answer, and what is hidden with its reasoning, follows vLLM 0.32
`chat_completion/serving.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from msgspec import UNSET, Struct

from tinfer.api.logprobs import chat_logprobs, prompt_logprobs
from tinfer.api.parsing import AnswerParser, ChatParsing, Piece, Said
from tinfer.api.responses import (
    ChatChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkHead,
    ChunkTail,
    DeltaMessage,
    Usage,
)
from tinfer.api.service import Delta
from tinfer.api.serving import (
    Answer,
    Counter,
    Job,
    sampled_logprobs,
    stop_tail,
    usage_tail,
    whole_trace,
)
from tinfer.api.sse import Framer
from tinfer.api.tools import ToolUse
from tinfer.errors import ParserFailed

log = logging.getLogger(__name__)


class Manner(Struct, frozen=True, kw_only=True):
    """How one chat is answered.

    `echoed` comes before each answer; without `include_reasoning`, reasoning and the tokens that
    would tell it are hidden, where a parser finds it.
    """

    role: str
    tools: ToolUse
    show_prompt_text: bool = False
    echoed: str = ""
    include_reasoning: bool = True
    counts_reasoning: bool = False


class ChatReply:
    """Writes the answers of one chat request."""

    def __init__(self, job: Job, manner: Manner, parsing: ChatParsing | None) -> None:
        self.job = job
        self.counter = Counter(job)
        self._manner = manner
        self._prompt_text = job.prompts[0].text if manner.show_prompt_text else None
        self._framer = Framer(ChunkHead(job.id, "chat.completion.chunk", job.created, job.model))
        self._parsing = parsing
        self._streams = [_ParsedStream(parsing) for _ in range(job.n)] if parsing else []
        self._hides_tokens = parsing is not None and not manner.include_reasoning
        if manner.counts_reasoning:
            self.counter.reasoning_tokens = [0] * job.num_answers

    # --- streamed -----------------------------------------------------------------------------

    def opening(self) -> bytes:
        """One chunk per answer that names the role, and what is echoed."""
        chunks = []
        for index in range(self.job.n):
            tail = ChunkTail(
                prompt_token_ids=self._prompt_token_ids(), prompt_text=self._prompt_text
            )
            if self.job.continuous_usage:
                tail.usage = self._usage_so_far(index)
            choice = ChatDelta(index, DeltaMessage("", self._manner.role), None, None)
            chunks.append(self._framer.chunk(choice, tail))
        if self._manner.echoed:
            for index in range(self.job.n):
                usage = self._usage_so_far(index) if self.job.continuous_usage else UNSET
                choice = ChatDelta(index, DeltaMessage(self._manner.echoed), None, None)
                chunks.append(self._framer.chunk(choice, ChunkTail(usage=usage)))
        return b"".join(chunks)

    def event(self, index: int, delta: Delta) -> bytes:
        finished = delta.finish_reason is not None
        message: DeltaMessage | None = DeltaMessage(delta.text)
        if self._parsing is not None:
            message = self._parsed_delta(index, delta)
        logprobs = None if self._hides_tokens else self._logprobs(delta)
        shows_ids = self.job.return_token_ids and not self._hides_tokens
        if message is None:
            if not finished and logprobs is None and not shows_ids:
                return b""
            message = DeltaMessage()
        choice = ChatDelta(
            index=index,
            delta=message,
            logprobs=logprobs,
            finish_reason=self._streamed_reason(index, delta.finish_reason),
            stop_reason=delta.stop_reason if finished else UNSET,
            token_ids=delta.token_ids if shows_ids else None,
        )
        usage = self._usage_so_far(index) if self.job.continuous_usage else None
        return self._framer.chunk(choice, stop_tail(self.job, delta, usage))

    def _parsed_delta(self, index: int, delta: Delta) -> DeltaMessage | None:
        stream = self._streams[index]
        piece = stream.piece(delta)
        counts = self.counter.reasoning_tokens
        finished = delta.finish_reason is not None
        if counts is not None and (finished or self.job.continuous_usage):
            counts[index] = stream.count_reasoning()
        if piece is None:
            return None
        calls = piece.tool_calls
        if not self._manner.tools.parallel:
            calls = [call for call in calls if call.index == 0]
        return DeltaMessage(
            content=UNSET if piece.content is None else piece.content,
            reasoning=UNSET if piece.reasoning is None else piece.reasoning,
            tool_calls=calls or UNSET,
        )

    def _streamed_reason(self, index: int, reason: str | None) -> str | None:
        """A named tool ends in `stop`, as OpenAI has it."""
        called = bool(self._streams) and self._streams[index].has_called
        return "tool_calls" if called and reason == "stop" and not self._is_named else reason

    @property
    def _is_named(self) -> bool:
        return self._manner.tools.is_named

    def closing(self) -> bytes:
        if not self.job.include_usage:
            return b""
        return self._framer.chunk(None, usage_tail(self.job, self.counter))

    def _usage_so_far(self, index: int) -> Usage:
        usage = self.counter.so_far(index)
        if self.counter.reasoning_tokens is None:
            usage.completion_tokens_details = None
        return usage

    # --- whole --------------------------------------------------------------------------------

    async def whole(self, answers: list[Answer]) -> ChatCompletion:
        about_prompt = answers[0].prompt_logprobs
        choices = [self._plain_choice(index, said) for index, said in enumerate(answers)]
        if self._parsing is not None:
            # A parser may take a while over a long answer, in which streams have to move.
            parts = await asyncio.to_thread(_take_apart, self._parsing, answers)
            for choice, said in zip(choices, parts, strict=True):
                self._fill(choice, said)
        if self._manner.echoed:
            for choice in choices:
                choice.message.content = self._manner.echoed + (choice.message.content or "")
        return ChatCompletion(
            id=self.job.id,
            created=self.job.created,
            model=self.job.model,
            choices=choices,
            usage=self.counter.total(),
            system_fingerprint=self.job.fingerprint,
            prompt_logprobs=None if about_prompt is None else prompt_logprobs(about_prompt),
            prompt_token_ids=self._prompt_token_ids(),
            prompt_text=self._prompt_text,
            tinfer=whole_trace(self.job, answers),
        )

    def _plain_choice(self, index: int, said: Answer) -> ChatChoice:
        shows_ids = self.job.return_token_ids and not self._hides_tokens
        return ChatChoice(
            index=index,
            message=ChatMessage(self._manner.role, "".join(said.text)),
            logprobs=None if self._hides_tokens else self._logprobs(said),
            finish_reason=said.finish_reason,
            stop_reason=said.stop_reason,
            token_ids=said.token_ids if shows_ids else None,
        )

    def _fill(self, choice: ChatChoice, said: Said) -> None:
        """Put what the parser has found in place of the text."""
        tools = self._manner.tools
        is_forced = tools.is_named or tools.choice == "required"
        calls = said.tool_calls if tools.parallel else said.tool_calls[:1]
        message = choice.message
        message.reasoning = said.reasoning
        message.content = said.content or "" if is_forced else said.content
        message.tool_calls = calls or UNSET
        ended = choice.finish_reason == "stop"
        if (tools.choice == "auto" and calls) or (tools.choice == "required" and ended):
            choice.finish_reason = "tool_calls"
        if self.counter.reasoning_tokens is not None:
            self.counter.reasoning_tokens[choice.index] = said.reasoning_tokens

    # --- both ---------------------------------------------------------------------------------

    def _logprobs(self, source: Delta | Answer) -> ChatLogprobs | None:
        if self.job.num_logprobs is None:
            return None
        return chat_logprobs(
            sampled_logprobs(source), self.job.num_logprobs, self.job.tokens_as_ids
        )

    def _prompt_token_ids(self) -> list[int] | None:
        return self.job.prompts[0].token_ids if self.job.return_token_ids else None


class _ParsedStream:
    """One streamed answer with its parser. One that has failed stays failed: it has no way back to
    where it was, and a delta may be offered twice."""

    def __init__(self, parsing: ChatParsing) -> None:
        self._parsing = parsing
        self._parser: AnswerParser | None = None
        self._token_ids: list[int] = []
        self._failure: ParserFailed | None = None
        self.has_called = False

    def piece(self, delta: Delta) -> Piece | None:
        """Raises `ParserFailed`."""
        if self._failure is not None:
            raise self._failure
        self._token_ids += delta.token_ids
        try:
            self._parser = self._parser or self._parsing.new()
            piece = _read(self._parser, delta)
        except Exception as error:  # noqa: BLE001 - a parser may raise anything about what it reads
            self._failure = _failed(error)
            raise self._failure from error
        self.has_called = self.has_called or bool(piece and piece.tool_calls)
        return piece

    def count_reasoning(self) -> int:
        return 0 if self._parser is None else self._parser.count_reasoning(self._token_ids)


def _read(parser: AnswerParser, delta: Delta) -> Piece | None:
    """What a delta adds, read step by step: many parsers lose what comes with what is before it."""
    begins = [(0, 0), *(delta.seams or ())]
    ends = [*begins[1:], (len(delta.text), len(delta.token_ids))]
    read: Piece | None = None
    for number, ((char, token), (end_char, end_token)) in enumerate(zip(begins, ends, strict=True)):
        finished = delta.finish_reason is not None and number == len(begins) - 1
        piece = parser.piece(delta.text[char:end_char], delta.token_ids[token:end_token], finished)
        read = piece if read is None else read.followed_by(piece)
    return read


def _take_apart(parsing: ChatParsing, answers: Sequence[Answer]) -> list[Said]:
    """Raises `ParserFailed`."""
    try:
        return [parsing.new().whole("".join(said.text), said.token_ids) for said in answers]
    except Exception as error:  # a parser may raise anything about what it reads
        raise _failed(error) from error


def _failed(error: Exception) -> ParserFailed:
    log.error("a parser broke on an answer", exc_info=error)
    return ParserFailed(f"the parser broke on this answer: {type(error).__name__}")
