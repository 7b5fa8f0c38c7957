"""What a client of `/v1/chat/completions` reads, whole or as a stream.

Where the server has parsers, they take each answer apart into reasoning, text and tool calls; what
ends an answer, and what is hidden with its reasoning, follows vLLM 0.32
`chat_completion/serving.py`.
"""

from __future__ import annotations

import asyncio

from msgspec import UNSET, Struct

from tinfer.api.logprobs import chat_logprobs, prompt_logprobs
from tinfer.api.parsing import ChatParsing, Said
from tinfer.api.reading import ParsedStream, take_apart
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
from tinfer.api.sse import Chunked, Framer
from tinfer.api.tools import ToolUse


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


class ChatReply(Chunked):
    """Writes the answers of one chat request."""

    def __init__(self, job: Job, manner: Manner, parsing: ChatParsing | None) -> None:
        self.job = job
        self.counter = Counter(job)
        self._manner = manner
        self._prompt_text = job.prompts[0].text if manner.show_prompt_text else None
        self._framer = Framer(ChunkHead(job.id, "chat.completion.chunk", job.created, job.model))
        self._parsing = parsing
        self._streams = [ParsedStream(parsing) for _ in range(job.n)] if parsing else []
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
            parts = await asyncio.to_thread(take_apart, self._parsing, answers)
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
