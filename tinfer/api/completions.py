"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Any, cast

import msgspec
from aiohttp import web

from tinfer.api import sampling
from tinfer.api.context import Api
from tinfer.api.logprobs import completion_logprobs, next_offset, prompt_logprobs, token_id_text
from tinfer.api.render import Prompt
from tinfer.api.responses import (
    ChunkHead,
    Completion,
    CompletionChoice,
    CompletionDelta,
    CompletionLogprobs,
)
from tinfer.api.schemas import CompletionRequest
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
from tinfer.api.sse import Chunked, Framer
from tinfer.core.sampling import TokenLogprobs
from tinfer.errors import EngineFailed, InvalidRequest

DEFAULT_MAX_TOKENS = 16  # Source: OpenAI and vLLM, CompletionRequest.max_tokens


class Echo(msgspec.Struct, frozen=True):
    """The prompt as it is repeated at the head of an answer.

    `first_token` is the text of the first prompt token, the only one that has no logprobs.
    """

    text: str
    first_token: str
    prompt_only: bool


async def handle(api: Api, request: web.Request) -> web.StreamResponse:
    """Validate, tokenise, run and answer one request."""
    parsed, headers = await api.read_sampling(request, api.completions)
    limits = api.limits
    prompt_tops = parsed.prompt_logprobs
    if prompt_tops is None and parsed.echo:
        prompt_tops = parsed.logprobs
    base = sampling.base_spec(
        parsed, api.options.sampling_defaults, limits, parsed.logprobs, prompt_tops
    )
    prompts = await _prompts(api, parsed)
    asked = DEFAULT_MAX_TOKENS if parsed.max_tokens is None else parsed.max_tokens
    prompt_only = bool(parsed.echo) and asked == 0
    job = api.job(request, parsed, "cmpl-", prompts, parsed.logprobs)
    specs = []
    for prompt in prompts:
        sampling.check_token_ids(prompt.token_ids, limits.vocab_size, "prompt")
        # Nothing can be run for no token at all: one is generated and not shown.
        spec = sampling.fit(base, len(prompt.token_ids), asked + prompt_only, limits, "prompt")
        specs.append(sampling.children(spec, job.n))
    echoes = [await _echo(api, p, job, prompt_only) for p in prompts] if parsed.echo else None
    reply = CompletionReply(job, echoes)
    sequences = generations(job, specs)
    return await answer(request, api.service, sequences, reply, bool(parsed.stream), headers)


async def _prompts(api: Api, parsed: CompletionRequest) -> list[Prompt]:
    """Every prompt of the request as token ids. Raises `InvalidRequest`."""
    items = _prompt_items(parsed.prompt)
    if len(items) > api.options.max_prompts:
        raise InvalidRequest(
            f"at most {api.options.max_prompts} prompts in one request, got {len(items)}",
            param="prompt",
        )
    special = parsed.add_special_tokens is not False
    return [
        await api.renderer.encode(item, special) if isinstance(item, str) else Prompt(item)
        for item in items
    ]


def _prompt_items(prompt: str | list[Any] | None) -> list[str] | list[list[int]]:
    if not prompt:
        raise InvalidRequest("a prompt is required and must not be empty", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        raise InvalidRequest(
            "a list must hold only strings, only token ids or only lists of token ids",
            param="prompt",
        )
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    return cast("list[str] | list[list[int]]", prompt)


async def _echo(api: Api, prompt: Prompt, job: Job, prompt_only: bool) -> Echo:
    """vLLM leaves the text out when the ids are asked for, and so do we."""
    text = ""
    if not job.return_token_ids:
        text = (
            prompt.text if prompt.text is not None else await api.renderer.decode(prompt.token_ids)
        )
    first = prompt.token_ids[0]
    if job.num_logprobs is None:
        first_token = ""
    elif job.tokens_as_ids:
        first_token = token_id_text(first)
    else:
        first_token = await api.renderer.decode([first])
    return Echo(text, first_token, prompt_only)


class CompletionReply(Chunked):
    """Writes the answers of one request; owns what a stream has to remember between chunks."""

    def __init__(self, job: Job, echoes: list[Echo] | None) -> None:
        self.job = job
        self.counter = Counter(job)
        self._echoes = echoes
        self._started = [False] * job.num_answers
        self._offsets = [0] * job.num_answers
        self._framer = Framer(ChunkHead(job.id, "text_completion", job.created, job.model))

    def opening(self) -> bytes:
        return b""

    def event(self, index: int, delta: Delta) -> bytes:
        job = self.job
        first = not self._started[index]
        self._started[index] = True
        logprobs = None
        if job.num_logprobs is not None:
            logprobs = self._logprobs(index, delta, first, self._offsets[index])
            self._offsets[index] = next_offset(logprobs, self._offsets[index])
        show_prompt = first and (job.return_token_ids or self._echoes is not None)
        choice = CompletionDelta(
            index=index,
            text=self._text(index, delta.text, first),
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            prompt_token_ids=self._prompt(index).token_ids if show_prompt else None,
            token_ids=delta.token_ids if job.return_token_ids else None,
        )
        usage = self.counter.so_far(index) if job.continuous_usage else None
        return self._framer.chunk(choice, stop_tail(job, delta, usage))

    def closing(self) -> bytes:
        if not self.job.include_usage:
            return b""
        return self._framer.chunk(None, usage_tail(self.job, self.counter))

    async def whole(self, answers: list[Answer]) -> Completion:
        return Completion(
            id=self.job.id,
            created=self.job.created,
            model=self.job.model,
            choices=[self._choice(index, a) for index, a in enumerate(answers)],
            usage=self.counter.total(),
            system_fingerprint=self.job.fingerprint,
            tinfer=whole_trace(self.job, answers),
        )

    def _choice(self, index: int, said: Answer) -> CompletionChoice:
        job = self.job
        logprobs = None
        if job.num_logprobs is not None:
            logprobs = self._logprobs(index, said, True, 0)
        about_prompt = said.prompt_logprobs
        return CompletionChoice(
            index=index,
            text=self._text(index, "".join(said.text), True),
            logprobs=logprobs,
            finish_reason=said.finish_reason,
            stop_reason=said.stop_reason,
            token_ids=said.token_ids if job.return_token_ids else None,
            prompt_logprobs=None if about_prompt is None else prompt_logprobs(about_prompt),
            prompt_token_ids=self._prompt(index).token_ids if job.return_token_ids else None,
        )

    def _text(self, index: int, said: str, first: bool) -> str:
        echo = self._echo(index)
        if echo is None:
            return said
        return (echo.text if first else "") + ("" if echo.prompt_only else said)

    def _logprobs(
        self, index: int, source: Delta | Answer, first: bool, offset: int
    ) -> CompletionLogprobs:
        assert self.job.num_logprobs is not None
        echo = self._echo(index)
        positions: list[TokenLogprobs | str] = []
        if echo is not None and first:
            if source.prompt_logprobs is None:
                raise EngineFailed("the engine sent no logprobs for the prompt")
            positions += [echo.first_token if p is None else p for p in source.prompt_logprobs]
        if echo is None or not echo.prompt_only:
            positions += sampled_logprobs(source)
        return completion_logprobs(positions, self.job.num_logprobs, self.job.tokens_as_ids, offset)

    def _prompt(self, index: int) -> Prompt:
        return self.job.prompts[index // self.job.n]

    def _echo(self, index: int) -> Echo | None:
        return None if self._echoes is None else self._echoes[index // self.job.n]
