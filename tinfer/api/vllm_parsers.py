"""vLLM's tool-call and reasoning parsers, behind the words of `parsing.py`.

The only module of the master's process that imports vLLM: it is loaded at the start, on a thread,
by a server that was asked for a parser, and by no other. The parsers see what vLLM's own front end
shows them, in the same order: a request is adjusted once its prompt is known, each answer has a
parser of its own, and a stream goes through `parse_delta` as it comes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.api.parsing import Asked, Piece, Said
from tinfer.api.responses import DeltaFunctionCall, DeltaToolCall, FunctionCall, ToolCall
from tinfer.api.schemas import Message, NamedTool
from tinfer.api.structured import check_generated
from tinfer.api.tools import for_template
from tinfer.core.sampling import SamplingSpec, StructuredSpec
from tinfer.errors import InvalidRequest, StartError

log = logging.getLogger(__name__)

_LOGGING = "VLLM_CONFIGURE_LOGGING"
# What a `StructuredSpec` and vLLM's `StructuredOutputsParams` both have, by the same names.
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_MANNERS = ("disable_any_whitespace", "whitespace_pattern")
# Rendered with vLLM's own library, which the chat templates here are not.
_HARMONY = "gpt_oss"


class ParserNames(Struct, frozen=True):
    """vLLM's names of the parsers that a server has; None for none."""

    tool_call: str | None = None
    reasoning: str | None = None
    strict_level: str = "auto"


def load_parsers(names: ParserNames, tokenizer: Any, model_dir: Path) -> VllmParsers:
    """Imports vLLM, which takes seconds. Raises `StartError` for a name that it does not have, and
    for a tokenizer without the tokens that a parser looks for."""
    with _plain_logging():
        try:
            from vllm.parser import ParserManager
            from vllm.tokenizers.hf import get_cached_tokenizer
        except ImportError as error:
            raise StartError(f"parsers are vLLM's, which cannot be imported: {error}") from error
        _check_names(names)
        model = _model_config(model_dir)
        cached: Any = get_cached_tokenizer(tokenizer)
        try:
            kind = ParserManager.get_parser(
                tool_parser_name=names.tool_call,
                reasoning_parser_name=names.reasoning,
                enable_auto_tools=names.tool_call is not None,
                tool_strict_level=names.strict_level,
                model_name=model_dir.name,
                tokenizer=cached,
            )
        except Exception as error:  # a parser may raise anything about a tokenizer
            raise StartError(" ".join(str(error).split())) from error
    return VllmParsers(kind, cached, model)


@contextlib.contextmanager
def _plain_logging() -> Iterator[None]:
    """Have vLLM log as everything here does, instead of to standard output, and leave what it says
    of its import to the workers, which inherit the environment as it is afterwards."""
    before = os.environ.get(_LOGGING)
    if before is None:
        os.environ[_LOGGING] = "0"
    root = logging.getLogger("vllm")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        if before is None:
            os.environ.pop(_LOGGING, None)


def _check_names(names: ParserNames) -> None:
    import vllm
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for flag, name, manager in (
        ("--tool-call-parser", names.tool_call, ToolParserManager),
        ("--reasoning-parser", names.reasoning, ReasoningParserManager),
    ):
        known = manager.list_registered()
        if name is not None and name not in known:
            raise StartError(
                f"{flag} {name}: vLLM {vllm.__version__} has no such parser; "
                f"it has {', '.join(known)}"
            )


def _model_config(model_dir: Path) -> Any:
    """What parsers ask of vLLM's ModelConfig. Raises `StartError`."""
    path = model_dir / "config.json"
    config: dict[str, Any] = {}
    if path.is_file():
        try:
            config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (msgspec.MsgspecError, OSError) as error:
            raise StartError(f"cannot read {path}: {error}") from error
    if config.get("model_type") == _HARMONY:
        raise StartError(
            "parsers for gpt-oss need prompts in the harmony format, which tinfer does not render"
        )
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    return SimpleNamespace(
        hf_config=SimpleNamespace(model_type=config.get("model_type")),
        hf_text_config=SimpleNamespace(model_type=text.get("model_type")),
        hf_overrides=None,
        architecture=next(iter(config.get("architectures") or ()), None),
    )


class VllmParsers:
    """Makes the parsing of each chat; `kind` is a subclass of vLLM's `Parser`."""

    def __init__(self, kind: Any, tokenizer: Any, model: Any) -> None:
        self._kind = kind
        self._tokenizer = tokenizer
        self._model = model

    @property
    def tools(self) -> bool:
        return self._kind.tool_parser_cls is not None

    @property
    def reasoning(self) -> bool:
        return self._kind.reasoning_parser_cls is not None

    def chat(self, asked: Asked) -> VllmChatParsing | None:
        """None where vLLM's parser would hand the text through as it is."""
        takes_markup = self.tools and self._kind.tool_parser_cls.engine_based_streaming
        if asked.tools.choice == "none" and not self.reasoning and not takes_markup:
            return None
        return VllmChatParsing(self, asked)

    def new(self, tools: list[Any] | None, template_kwargs: dict[str, Any]) -> Any:
        """A parser of vLLM's for one answer."""
        return self._kind(
            self._tokenizer, tools, chat_template_kwargs=template_kwargs, model_config=self._model
        )


class VllmChatParsing:
    """One chat as vLLM's parsers see it."""

    def __init__(self, parsers: VllmParsers, asked: Asked) -> None:
        self._parsers = parsers
        self._asked = asked
        self._request = _vllm_request(asked)

    def adjusted(self, spec: SamplingSpec) -> SamplingSpec:
        """`spec` after vLLM's `adjust_request`; may take milliseconds for a large schema."""
        request = self._request
        request.skip_special_tokens = spec.skip_special_tokens
        request.spaces_between_special_tokens = spec.spaces_between_special_tokens
        before = request.structured_outputs = _vllm_constraint(spec.structured)
        parser = self._new()
        if self._parsers.reasoning or self._asked.tools.choice != "none":
            try:
                request = self._request = parser.adjust_request(request=request)
            except Exception as error:  # noqa: BLE001 - parsers read the client's schemas as they are
                log.warning("tools that a parser cannot use", exc_info=error)
                raise InvalidRequest(
                    f"the parser cannot use them: {type(error).__name__}: {error}", param="tools"
                ) from error
        structured = spec.structured
        if request.structured_outputs is not before:
            structured = _own_constraint(request.structured_outputs)
            check_generated(structured, "tools")
        if structured is not None and self._parsers.reasoning:
            structured = self._with_reasoning(structured, parser)
        return msgspec.structs.replace(
            spec,
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
            structured=structured,
        )

    def _with_reasoning(self, structured: StructuredSpec, parser: Any) -> StructuredSpec:
        """With where the worker is to begin with the grammar."""
        ended = self._request.resolve_reasoning_ended(parser, self._asked.prompt_token_ids)
        kwargs = msgspec.json.encode(self._asked.template_kwargs).decode()
        return msgspec.structs.replace(structured, reasoning_ended=ended, template_kwargs=kwargs)

    def new(self) -> VllmAnswerParser:
        return VllmAnswerParser(self._new(), self._request, self._asked)

    def _new(self) -> Any:
        return self._parsers.new(self._request.tools, self._asked.template_kwargs)


class VllmAnswerParser:
    """One answer of a chat, read by a parser of vLLM's."""

    def __init__(self, parser: Any, request: Any, asked: Asked) -> None:
        self._parser = parser
        self._request = request
        self._asked = asked

    def whole(self, text: str, token_ids: Sequence[int]) -> Said:
        self._parser.set_prompt_token_ids(self._asked.prompt_token_ids)
        reasoning, content, calls = self._parser.parse(
            text, self._request, enable_auto_tools=True, model_output_token_ids=token_ids
        )
        from vllm.renderers.chat_utils import make_tool_call_id

        return Said(
            reasoning=reasoning if self._asked.include_reasoning else None,
            content=content,
            tool_calls=[
                ToolCall(call.id or make_tool_call_id(), FunctionCall(call.name, call.arguments))
                for call in calls or ()
            ],
            reasoning_tokens=self.count_reasoning(token_ids),
        )

    def piece(self, text: str, token_ids: list[int], finished: bool) -> Piece | None:
        message = self._parser.parse_delta(
            delta_text=text,
            delta_token_ids=token_ids,
            request=self._request,
            prompt_token_ids=self._asked.prompt_token_ids,
            finished=finished,
        )
        if message is None:
            return None
        calls = [_delta_call(call) for call in message.tool_calls or ()]
        return Piece(message.reasoning, message.content, calls)

    def count_reasoning(self, token_ids: Sequence[int]) -> int:
        return int(self._parser.count_reasoning_tokens(tuple(token_ids)))


def _vllm_request(asked: Asked) -> Any:
    """The chat as vLLM's own struct; what is checked already is not checked again."""
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionNamedToolChoiceParam,
        ChatCompletionRequest,
        ChatCompletionToolsParam,
    )

    use = asked.tools
    tools = None
    if use.tools is not None:
        tools = [ChatCompletionToolsParam.model_validate(for_template(tool)) for tool in use.tools]
    choice: Any = use.choice
    if isinstance(choice, NamedTool):
        choice = ChatCompletionNamedToolChoiceParam.model_validate(msgspec.to_builtins(choice))
    return ChatCompletionRequest.model_construct(
        messages=[_as_history(message) for message in asked.messages],
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=use.parallel,
        include_reasoning=asked.include_reasoning,
        chat_template_kwargs=asked.template_kwargs,
    )


def _as_history(message: Message) -> dict[str, Any]:
    """What parsers ask of the messages: who speaks, and how many calls there were."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls is not None:
        said["tool_calls"] = message.tool_calls
    return said


def _vllm_constraint(spec: StructuredSpec | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if spec is None:
        return None
    return StructuredOutputsParams(
        **{name: getattr(spec, name) for name in (*_CONSTRAINTS, *_MANNERS)}
    )


def _own_constraint(params: Any) -> StructuredSpec | None:
    if params is None:
        return None
    fields = {name: getattr(params, name) for name in (*_CONSTRAINTS, *_MANNERS)}
    if fields["json"] is not None and not isinstance(fields["json"], str):
        fields["json"] = msgspec.json.encode(fields["json"]).decode()
    return StructuredSpec(**fields)


def _delta_call(call: Any) -> DeltaToolCall:
    said = DeltaToolCall(call.index)
    if call.id is not None:
        said.id = call.id
    if call.type is not None:
        said.type = call.type
    if call.function is not None:
        said.function = DeltaFunctionCall()
        if call.function.name is not None:
            said.function.name = call.function.name
        if call.function.arguments is not None:
            said.function.arguments = call.function.arguments
    return said
