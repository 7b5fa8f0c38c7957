"""Request fields that `schemas.py` does not declare: refused, without effect, or unknown.

One table for completions and chats, and one for responses that adds to it. A field that would
change the answer, and that we do not carry out, is refused unless its value means "off": an answer
that silently lacks what was asked for is wrong.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.errors import InvalidRequest

log = logging.getLogger(__name__)

IGNORED_HEADER = "X-Tinfer-Ignored"
MAX_NAMES_IN_HEADER = 16
MAX_NAME_CHARS = 48
MAX_LOGGED_NAMES = 256

_OFF: tuple[Any, ...] = (None, False)
_EMPTY: tuple[Any, ...] = (None, [], {})

# Name → the values that change nothing (an absent field is never looked up).
REFUSED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": _EMPTY,
    "modalities": (None, [], ["text"]),
    "moderation": _EMPTY,
    "prediction": _EMPTY,
    "suffix": (None,),
    "tool_choice": (None, "none"),
    "tools": _EMPTY,
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    # OpenAI names that one of the endpoints declares and the other does not carry out
    "echo": _OFF,
    "max_completion_tokens": (None,),
    "top_logprobs": (None, 0),
    # vLLM 0.32
    "cache_salt": (None,),
    "ec_transfer_params": _EMPTY,
    "kv_transfer_params": _EMPTY,
    "length_penalty": (None, 1.0),
    "logprob_token_ids": _EMPTY,
    "media_io_kwargs": _EMPTY,
    "mm_processor_kwargs": _EMPTY,
    "prompt_embeds": _EMPTY,
    "repetition_detection": (None,),
    "routed_experts_prompt_start": (None, 0),
    "stream_interval": (None, 1),
    "thinking_token_budget": (None, -1),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "use_beam_search": _OFF,
    "vllm_xargs": _EMPTY,
    "watermarking": _OFF,
    # vLLM of old; 0.32 ignores them, so the answer would not be constrained
    "early_stopping": _OFF,
    "guided_choice": _EMPTY,
    "guided_decoding_backend": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_whitespace_pattern": (None,),
    "logits_processors": _EMPTY,
    "structural_tag": (None,),
}

# Known to OpenAI or vLLM and without effect on the answer here, whatever the value.
NO_EFFECT = frozenset(
    {
        "include_reasoning",
        "metadata",
        "mm_payload",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "return_mm_kwargs",
        "return_token_offsets",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
    }
)

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]")


class Undeclared(Struct, frozen=True):
    """What is known of the fields that an endpoint does not declare.

    `refused`: name → the values that change nothing; `reasons`: what to say where such a name has
    another value, for those of which more can be said; `no_effect`: names that may have any value.
    """

    refused: dict[str, tuple[Any, ...]]
    no_effect: frozenset[str]
    reasons: dict[str, str] = {}


USUAL = Undeclared(REFUSED, NO_EFFECT)
_STORES_NOTHING = "this server stores no responses"
RESPONSES = Undeclared(
    refused=REFUSED
    | {
        # OpenAI
        "background": _OFF,
        "context_management": _EMPTY,
        "conversation": (None,),
        "previous_response_id": (None,),
        "prompt": (None,),
        # vLLM 0.32
        "enable_response_messages": _OFF,
        "previous_input_messages": _EMPTY,
        # Of the other endpoints: what is wanted has another name here, or cannot be had
        "add_generation_prompt": (None, True),
        "add_special_tokens": _OFF,
        "allowed_token_ids": (None,),
        "bad_words": _EMPTY,
        "chat_template": (None,),
        "continue_final_message": _OFF,
        "documents": _EMPTY,
        "logprobs": _OFF,
        "max_tokens": (None,),
        "messages": _EMPTY,
        "min_tokens": (None, 0),
        "n": (None, 1),
        "prompt_logprobs": (None,),
        "reasoning_effort": (None,),
        "response_format": (None, {"type": "text"}),
        "return_prompt_text": _OFF,
        "return_token_ids": _OFF,
        "return_tokens_as_token_ids": _OFF,
        "spaces_between_special_tokens": (None, True),
    },
    # `stream_options` can only ask for less obfuscation, and there is none.
    no_effect=NO_EFFECT | {"prompt_cache_options", "stream_options"},
    reasons={
        "background": f"{_STORES_NOTHING}, so none can be computed in the background",
        "conversation": f"{_STORES_NOTHING}; send what was said before in `input`",
        "logprobs": 'ask with `include: ["message.output_text.logprobs"]` and `top_logprobs`',
        "max_completion_tokens": "is called `max_output_tokens` here",
        "max_tokens": "is called `max_output_tokens` here",
        "messages": "is called `input` here",
        "n": "a response is one answer",
        "previous_response_id": f"{_STORES_NOTHING}; send what was said before in `input`",
        "prompt": "this server stores no prompts; send `input`",
        "reasoning_effort": "is called `reasoning.effort` here",
        "response_format": "is called `text.format` here",
    },
)


class IgnoredLog(Struct):
    """Names already logged, to log each once; bounded, since clients choose them."""

    seen: set[str] = msgspec.field(default_factory=set)

    def note(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self.seen and len(self.seen) < MAX_LOGGED_NAMES:
                self.seen.add(name)
                log.warning("request field is unknown and ignored", extra={"field": name})


def screen(
    sent: Mapping[str, msgspec.Raw],
    declared: Collection[str],
    strict: bool,
    known: Undeclared = USUAL,
) -> list[str]:
    """Judge the undeclared fields of one request; returns the unknown ones, safe to log and send.

    Raises `InvalidRequest` for a field that is known but not supported, and with `strict` for any
    unknown one.
    """
    unknown: list[str] = []
    for name, raw in sent.items():
        if name in declared or name in known.no_effect:
            continue
        shown = _UNSAFE.sub("?", name[:MAX_NAME_CHARS])
        if name in known.refused:
            value = msgspec.json.decode(raw)
            if not any(_same(value, off) for off in known.refused[name]):
                usual = f"`{shown}` is not supported with this value"
                raise InvalidRequest(known.reasons.get(name, usual), param=shown)
        elif strict:
            raise InvalidRequest(f"`{shown}` is not a known field", param=shown)
        else:
            unknown.append(shown)
    return unknown


def _same(value: object, other: object) -> bool:
    """Equal in JSON, where false is not 0 and true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def ignored_header(unknown: list[str]) -> dict[str, str]:
    """The response header that names what was ignored; empty when nothing was."""
    if not unknown:
        return {}
    shown = unknown[:MAX_NAMES_IN_HEADER]
    if len(unknown) > len(shown):
        shown.append(f"+{len(unknown) - len(shown)}")
    return {IGNORED_HEADER: ",".join(shown)}
