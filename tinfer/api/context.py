"""What every handler needs, made once by `create_app`."""

from __future__ import annotations

import time
from typing import TypeVar

from aiohttp import web

from tinfer.api.deadline import header_seconds, shortest
from tinfer.api.decode import BodyDecoder
from tinfer.api.fields import IgnoredLog, ignored_header
from tinfer.api.limits import MAX_REQUEST_ID_CHARS
from tinfer.api.options import ApiOptions
from tinfer.api.parsing import Parsers
from tinfer.api.render import Prompt, Renderer
from tinfer.api.request_log import ID_HEADER, id_of, note_id
from tinfer.api.responses_api.request import ResponsesRequest
from tinfer.api.sampling import ModelLimits
from tinfer.api.schemas import (
    Addressed,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    TokenizeRequest,
    Wishes,
)
from tinfer.api.service import Hints, Service
from tinfer.api.serving import Job
from tinfer.api.trace import wants_trace
from tinfer.errors import InvalidRequest, ModelNotFound

MAX_SHOWN_CHARS = 256
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

RequestT = TypeVar("RequestT", bound=Addressed)
SamplingT = TypeVar("SamplingT", bound=SamplingFields)


class Api:
    """The service, the renderer, the options and (where there are any) the parsers behind the HTTP
    handlers."""

    def __init__(
        self,
        service: Service,
        renderer: Renderer,
        options: ApiOptions,
        parsers: Parsers | None = None,
    ) -> None:
        self.service = service
        self.renderer = renderer
        self.parsers = parsers
        self.options = options
        self.completions = BodyDecoder(CompletionRequest, options.strict_params)
        self.chats = BodyDecoder(ChatRequest, options.strict_params)
        self.responses = BodyDecoder(ResponsesRequest, options.strict_params)
        self.tokenizations = BodyDecoder(TokenizeRequest, options.strict_params)
        self.detokenizations = BodyDecoder(DetokenizeRequest, options.strict_params)
        self._ignored = IgnoredLog()

    @property
    def limits(self) -> ModelLimits:
        model = self.service.model
        return ModelLimits(model.max_model_len, model.vocab_size, self.options.max_logprobs)

    async def read(
        self, request: web.Request, decoder: BodyDecoder[RequestT]
    ) -> tuple[RequestT, dict[str, str]]:
        """The typed request and the headers that go with its answer.

        Raises `InvalidRequest` for a body that is not what the endpoint takes, `ModelNotFound`.
        """
        if request.content_type != "application/json":
            raise InvalidRequest("the Content-Type must be application/json")
        parsed, unknown = decoder.decode(await request.read())
        self._ignored.note(unknown)
        names = self.service.model.names
        if parsed.model and parsed.model not in names:
            asked, served = parsed.model[:MAX_SHOWN_CHARS], ", ".join(names)
            raise ModelNotFound(
                f"the model `{asked}` does not exist; served: {served}", param="model"
            )
        return parsed, ignored_header(unknown)

    async def read_sampling(
        self, request: web.Request, decoder: BodyDecoder[SamplingT]
    ) -> tuple[SamplingT, dict[str, str]]:
        """`read` for a request that generates, with what both such endpoints refuse."""
        parsed, headers = await self.read(request, decoder)
        if parsed.stream_options is not None and not parsed.stream:
            raise InvalidRequest("needs stream to be true", param="stream_options")
        if parsed.stream and parsed.prompt_logprobs:
            raise InvalidRequest("is not available in a stream", param="prompt_logprobs")
        return parsed, headers

    def job(
        self,
        request: web.Request,
        parsed: SamplingFields,
        prefix: str,
        prompts: list[Prompt],
        num_logprobs: int | None,
    ) -> Job:
        """What the request wants to see; `prefix` comes before its own id.

        Raises `InvalidRequest` for too many answers and for headers that mean nothing.
        """
        options = self.options
        n = parsed.n or 1
        if len(prompts) * n > options.max_sequences:
            raise InvalidRequest(f"at most {options.max_sequences} answers at once", param="n")
        usage = parsed.stream_options
        wishes = parsed.tinfer or Wishes()
        include_prediction = bool(wishes.include_prediction)
        include_prediction |= usage is not None and bool(usage.include_prediction)
        include_usage = usage is not None and bool(usage.include_usage)
        continuous = include_usage and usage is not None and bool(usage.continuous_usage_stats)
        hints = _hints(request, parsed, wishes)
        as_ids = parsed.return_tokens_as_token_ids
        own_id = _header_id(request) or parsed.request_id or id_of(request)
        note_id(request, own_id)
        if len(own_id) > MAX_REQUEST_ID_CHARS:
            message = f"takes at most {MAX_REQUEST_ID_CHARS} characters, got {len(own_id)}"
            raise InvalidRequest(message, param="request_id")
        return Job(
            id=prefix + own_id,
            created=int(time.time()),
            model=self.service.model.names[0],
            fingerprint=options.system_fingerprint,
            prompts=prompts,
            n=n,
            include_usage=include_usage or include_prediction or options.force_include_usage,
            continuous_usage=continuous or options.force_include_usage,
            cached_details=options.enable_prompt_tokens_details,
            return_token_ids=bool(parsed.return_token_ids),
            tokens_as_ids=options.return_tokens_as_token_ids if as_ids is None else as_ids,
            num_logprobs=num_logprobs,
            show_trace=wants_trace(request),
            include_prediction=include_prediction,
            hints=hints,
            timeout_s=shortest(hints.deadline_s, options.request_timeout_s),
            trace_headers=_trace_headers(request),
        )


def _hints(request: web.Request, parsed: SamplingFields, wishes: Wishes) -> Hints:
    """What the client says of its request. Raises `InvalidRequest` where it contradicts itself."""
    priorities = {one for one in (parsed.priority, wishes.priority) if one is not None}
    if len(priorities) > 1:
        raise InvalidRequest("is not the priority beside it", param="tinfer.priority")
    field_s = None if wishes.deadline_ms is None else wishes.deadline_ms / 1e3
    return Hints(
        expected_output_tokens=wishes.expected_output_tokens,
        priority=priorities.pop() if priorities else 0,
        deadline_s=shortest(header_seconds(request), field_s),
    )


def _trace_headers(request: web.Request) -> dict[str, str] | None:
    """The client's W3C trace context, unread; None where it sends none."""
    parents = request.headers.getall(TRACEPARENT, ())
    if len(parents) != 1:  # Source: W3C Trace Context, 3.2: of several none counts
        return None
    states = ",".join(request.headers.getall(TRACESTATE, ()))
    return {TRACEPARENT: parents[0]} | ({TRACESTATE: states} if states else {})


def _header_id(request: web.Request) -> str:
    """The client's own id from the header, "" where there is none. Raises `InvalidRequest`."""
    own_id = request.headers.get(ID_HEADER, "")
    try:
        own_id.encode()
    except UnicodeEncodeError as error:  # aiohttp keeps bytes that are not UTF-8 as surrogates
        raise InvalidRequest("must be UTF-8", param=ID_HEADER) from error
    return own_id
