"""What the HTTP layer can be told, all of it with vLLM's defaults."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from tinfer.api import limits
from tinfer.api.cors import Cors
from tinfer.api.keys import ApiKeys
from tinfer.api.sampling import SamplingDefaults


class ApiOptions(Struct, frozen=True, kw_only=True):
    """How the API behaves.

    `system_fingerprint` None sends null. `max_logprobs` -1 lifts the bound.
    """

    version: str
    system_fingerprint: str | None = None
    strict_params: bool = False
    max_logprobs: int = 20  # Source: vLLM --max-logprobs default
    max_prompts: int = 1024  # Source: vLLM VLLM_MAX_COMPLETION_PROMPTS default
    max_sequences: int = 16384
    max_body_bytes: int = limits.MAX_BODY_BYTES
    max_arriving_bytes: int = limits.MAX_ARRIVING_BYTES
    body_timeout_s: float = limits.BODY_TIMEOUT_S
    # Of a whole answer; clients may ask for less (`deadline.py`).
    request_timeout_s: float | None = None
    api_keys: ApiKeys = ApiKeys()
    cors: Cors = Cors()
    enable_prompt_tokens_details: bool = False
    force_include_usage: bool = False
    trust_request_chat_template: bool = False
    exclude_tools_when_tool_choice_none: bool = False
    return_tokens_as_token_ids: bool = False
    default_chat_template_kwargs: dict[str, Any] = {}
    response_role: str = "assistant"
    sampling_defaults: SamplingDefaults = SamplingDefaults()
