"""`POST /v1/chat/completions`: from the request to the sequences that answer it."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from aiohttp import web
from msgspec import Struct

from tinfer.api import sampling
from tinfer.api.chat_reply import ChatReply, Manner
from tinfer.api.context import Api
from tinfer.api.messages import texts
from tinfer.api.parsing import Asked, ChatParsing
from tinfer.api.render import ChatOptions, Prompt
from tinfer.api.schemas import ChatRequest
from tinfer.api.serving import answer, generations
from tinfer.api.tools import ToolUse, for_template, tool_use
from tinfer.core.sampling import SamplingSpec
from tinfer.errors import InvalidRequest


class Prepared(Struct, frozen=True):
    """A chat that can be run: `num_logprobs` top candidates per token are to be shown, None for no
    logprobs; `parsing` reads the answers, where something does."""

    prompt: Prompt
    spec: SamplingSpec
    tools: ToolUse
    parsing: ChatParsing | None
    num_logprobs: int | None


async def handle(api: Api, request: web.Request) -> web.StreamResponse:
    """Validate, render, run and answer one request."""
    parsed, headers = await api.read_sampling(request, api.chats)
    ready = await prepare(api, parsed)
    job = api.job(request, parsed, "chatcmpl-", [ready.prompt], ready.num_logprobs)
    reply = ChatReply(job, _manner(api, parsed, ready.tools), ready.parsing)
    sequences = generations(job, [sampling.children(ready.spec, job.n)])
    return await answer(request, api.service, sequences, reply, bool(parsed.stream), headers)


async def prepare(api: Api, parsed: ChatRequest) -> Prepared:
    """Validate and render one chat. Raises `InvalidRequest` with the field at fault."""
    tools = tool_use(parsed, api.parsers is not None and api.parsers.tools)
    limits = api.limits
    num_logprobs = _num_logprobs(parsed)
    base = sampling.base_spec(
        parsed,
        api.options.sampling_defaults,
        limits,
        num_logprobs,
        _prompt_logprobs(parsed),
        "top_logprobs",
    )
    options = _options(api, parsed, tools)
    prompt = await api.renderer.render_chat(parsed.messages, options)
    sampling.check_token_ids(prompt.token_ids, limits.vocab_size, "messages")
    parsing, base = await _parsing(api, parsed, tools, options, prompt, base)
    spec = _fitted(api, parsed, base, prompt)
    return Prepared(prompt, spec, tools, parsing, num_logprobs)


def _fitted(api: Api, parsed: ChatRequest, base: SamplingSpec, prompt: Prompt) -> SamplingSpec:
    asked, param = parsed.max_tokens, "max_tokens"
    if parsed.max_completion_tokens is not None:
        asked, param = parsed.max_completion_tokens, "max_completion_tokens"
    default = api.options.sampling_defaults.max_new_tokens
    if asked is None and default is not None:
        asked = min(default, api.limits.max_model_len)
    return sampling.fit(base, len(prompt.token_ids), asked, api.limits, "messages", param)


async def _parsing(
    api: Api,
    parsed: ChatRequest,
    tools: ToolUse,
    options: ChatOptions,
    prompt: Prompt,
    spec: SamplingSpec,
) -> tuple[ChatParsing | None, SamplingSpec]:
    """What reads the answers, where something does, and the spec as it needs it."""
    parsers = api.parsers
    if parsers is None:
        return None, spec
    own = options.kwargs.keys() - {"tools"}
    asked = Asked(
        messages=parsed.messages,
        tools=tools,
        template_kwargs={name: options.kwargs[name] for name in own}
        | {
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
        },
        prompt_token_ids=prompt.token_ids,
        include_reasoning=parsed.include_reasoning is not False,
    )

    def prepare() -> tuple[ChatParsing | None, SamplingSpec]:
        parsing = parsers.chat(asked)
        return parsing, spec if parsing is None else parsing.adjusted(spec)

    return await api.renderer.run(prepare)


def _num_logprobs(parsed: ChatRequest) -> int | None:
    if parsed.logprobs:
        return parsed.top_logprobs or 0
    if parsed.top_logprobs:
        raise InvalidRequest("needs logprobs to be true", param="top_logprobs")
    return None


def _prompt_logprobs(parsed: ChatRequest) -> int | None:
    """With `echo` as many as of the answer, as in vLLM; a stream has no place for them."""
    if parsed.prompt_logprobs is None and parsed.echo and not parsed.stream:
        return parsed.top_logprobs or 0
    return parsed.prompt_logprobs


def _manner(api: Api, parsed: ChatRequest, tools: ToolUse) -> Manner:
    last = parsed.messages[-1]
    role = api.options.response_role
    if parsed.add_generation_prompt is False:
        role = last.role
    echoed = ""
    if parsed.echo and last.role == role:
        echoed = "\n".join(texts(last, len(parsed.messages) - 1))
    return Manner(
        role=role,
        tools=tools,
        show_prompt_text=bool(parsed.return_prompt_text),
        echoed=echoed,
        include_reasoning=parsed.include_reasoning is not False,
        counts_reasoning=api.parsers is not None and api.parsers.reasoning,
    )


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


def _options(api: Api, parsed: ChatRequest, tools: ToolUse) -> ChatOptions:
    """How to render, with what some fields of a completion mean for the template."""
    options = chat_options(api, parsed)
    kwargs = dict(options.kwargs)
    hidden = tools.choice == "none" and api.options.exclude_tools_when_tool_choice_none
    if tools.tools is not None and not hidden:
        kwargs.setdefault("tools", [for_template(tool) for tool in tools.tools])
    if parsed.documents is not None:
        kwargs["documents"] = parsed.documents
    if parsed.reasoning_effort is not None:
        kwargs["reasoning_effort"] = parsed.reasoning_effort
        kwargs.setdefault("enable_thinking", parsed.reasoning_effort != "none")
    return msgspec.structs.replace(options, kwargs=kwargs)
