"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from aiohttp import web
from msgspec import UNSET

from tinfer.api import sampling
from tinfer.api.context import Api
from tinfer.api.logprobs import chat_logprobs, prompt_logprobs
from tinfer.api.render import ChatOptions
from tinfer.api.responses import (
    ChatChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkHead,
    ChunkTail,
    DeltaMessage,
)
from tinfer.api.schemas import ChatRequest
from tinfer.api.service import Delta
from tinfer.api.serving import (
    Answer,
    Counter,
    Job,
    answer,
    generations,
    sampled_logprobs,
    stop_tail,
    usage_tail,
    whole_trace,
)
from tinfer.api.sse import Framer
from tinfer.errors import InvalidRequest


async def handle(api: Api, request: web.Request) -> web.StreamResponse:
    """Validate, render, run and answer one request."""
    parsed, headers = await api.read_sampling(request, api.chats)
    limits = api.limits
    num_logprobs = _num_logprobs(parsed)
    base = sampling.base_spec(
        parsed,
        api.options.sampling_defaults,
        limits,
        num_logprobs,
        parsed.prompt_logprobs,
        "top_logprobs",
    )
    prompt = await api.renderer.render_chat(parsed.messages, _options(api, parsed))
    sampling.check_token_ids(prompt.token_ids, limits.vocab_size, "messages")
    asked, param = parsed.max_tokens, "max_tokens"
    if parsed.max_completion_tokens is not None:
        asked, param = parsed.max_completion_tokens, "max_completion_tokens"
    default = api.options.sampling_defaults.max_new_tokens
    if asked is None and default is not None:
        asked = min(default, limits.max_model_len)
    spec = sampling.fit(base, len(prompt.token_ids), asked, limits, "messages", param)
    job = api.job(request, parsed, "chatcmpl", [prompt], num_logprobs)
    reply = ChatReply(job, _role(api, parsed), bool(parsed.return_prompt_text))
    sequences = generations(job, [sampling.children(spec, job.n)])
    return await answer(request, api.service, sequences, reply, bool(parsed.stream), headers)


def _num_logprobs(parsed: ChatRequest) -> int | None:
    if parsed.logprobs:
        return parsed.top_logprobs or 0
    if parsed.top_logprobs:
        raise InvalidRequest("needs logprobs to be true", param="top_logprobs")
    return None


def _role(api: Api, parsed: ChatRequest) -> str:
    if parsed.add_generation_prompt is False:
        return parsed.messages[-1].role
    return api.options.response_role


class RenderFields(Protocol):
    """The fields of a chat to be rendered, whatever is done with the result."""

    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None


def chat_options(api: Api, parsed: RenderFields) -> ChatOptions:
    """How to render. Raises `InvalidRequest`.

    A template of the client's own is a program, so it needs to be allowed.
    """
    if parsed.chat_template is not None and not api.options.trust_request_chat_template:
        raise InvalidRequest("templates in requests are not allowed here", param="chat_template")
    continues = bool(parsed.continue_final_message)
    if continues and parsed.add_generation_prompt is not False:
        raise InvalidRequest(
            "needs add_generation_prompt to be false", param="continue_final_message"
        )
    return ChatOptions(
        template=parsed.chat_template,
        add_generation_prompt=parsed.add_generation_prompt is not False,
        continue_final_message=continues,
        add_special_tokens=bool(parsed.add_special_tokens),
        kwargs=api.options.default_chat_template_kwargs | (parsed.chat_template_kwargs or {}),
    )


def _options(api: Api, parsed: ChatRequest) -> ChatOptions:
    """How to render, with what some fields of a completion mean for the template."""
    options = chat_options(api, parsed)
    kwargs = dict(options.kwargs)
    if parsed.documents is not None:
        kwargs["documents"] = parsed.documents
    if parsed.reasoning_effort is not None:
        kwargs["reasoning_effort"] = parsed.reasoning_effort
        kwargs.setdefault("enable_thinking", parsed.reasoning_effort != "none")
    return msgspec.structs.replace(options, kwargs=kwargs)


class ChatReply:
    """Writes the answers of one chat request."""

    def __init__(self, job: Job, role: str, show_prompt_text: bool) -> None:
        self.job = job
        self.counter = Counter(job)
        self._role = role
        self._prompt_text = job.prompts[0].text if show_prompt_text else None
        self._framer = Framer(ChunkHead(job.id, "chat.completion.chunk", job.created, job.model))

    def opening(self) -> bytes:
        """One chunk per answer that names the role."""
        chunks = []
        for index in range(self.job.n):
            tail = ChunkTail(
                prompt_token_ids=self._prompt_token_ids(), prompt_text=self._prompt_text
            )
            if self.job.continuous_usage:
                tail.usage = self.counter.so_far(index)
                tail.usage.completion_tokens_details = None
            choice = ChatDelta(index, DeltaMessage("", self._role), None, None)
            chunks.append(self._framer.chunk(choice, tail))
        return b"".join(chunks)

    def event(self, index: int, delta: Delta) -> bytes:
        finished = delta.finish_reason is not None
        choice = ChatDelta(
            index=index,
            delta=DeltaMessage(delta.text),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason if finished else UNSET,
            token_ids=delta.token_ids if self.job.return_token_ids else None,
        )
        usage = None
        if self.job.continuous_usage:
            usage = self.counter.so_far(index)
            usage.completion_tokens_details = None
        return self._framer.chunk(choice, stop_tail(self.job, delta, usage))

    def closing(self) -> bytes:
        if not self.job.include_usage:
            return b""
        return self._framer.chunk(None, usage_tail(self.job, self.counter))

    def whole(self, answers: list[Answer]) -> ChatCompletion:
        about_prompt = answers[0].prompt_logprobs
        return ChatCompletion(
            id=self.job.id,
            created=self.job.created,
            model=self.job.model,
            choices=[self._choice(index, said) for index, said in enumerate(answers)],
            usage=self.counter.total(),
            system_fingerprint=self.job.fingerprint,
            prompt_logprobs=None if about_prompt is None else prompt_logprobs(about_prompt),
            prompt_token_ids=self._prompt_token_ids(),
            prompt_text=self._prompt_text,
            tinfer=whole_trace(self.job, answers),
        )

    def _choice(self, index: int, said: Answer) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(self._role, "".join(said.text)),
            logprobs=self._logprobs(said),
            finish_reason=said.finish_reason,
            stop_reason=said.stop_reason,
            token_ids=said.token_ids if self.job.return_token_ids else None,
        )

    def _logprobs(self, source: Delta | Answer) -> ChatLogprobs | None:
        if self.job.num_logprobs is None:
            return None
        return chat_logprobs(
            sampled_logprobs(source), self.job.num_logprobs, self.job.tokens_as_ids
        )

    def _prompt_token_ids(self) -> list[int] | None:
        return self.job.prompts[0].token_ids if self.job.return_token_ids else None
