"""How one answer is sampled, and what a sampled position says of itself.

Shared by the API, which validates it, the wire, which carries it, and the workers, which hand it to
vLLM; the scheduler itself never looks inside.
"""

from __future__ import annotations

from msgspec import Struct


class StructuredSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the answer must match; exactly one of the first five is set.

    Names and meaning are those of vLLM's `structured_outputs`; `json` is a schema as JSON text. On
    a server with a reasoning parser the answer matches from the end of its reasoning on: from the
    start where `reasoning_ended`, else where the parser finds it; `template_kwargs`, JSON as text,
    are those of the chat's template.
    """

    json: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    reasoning_ended: bool | None = None
    template_kwargs: str | None = None


class SamplingSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to sample one answer: vLLM's SamplingParams for n = 1, by the same names and meaning.

    `max_tokens` is always set: the API resolves an absent one to what the model's length leaves.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredSpec | None = None


class TokenLogprobs(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Logprobs of one position: the sampled token first, then the top ones as vLLM orders them.

    `ranks` are 1-based ranks in the vocabulary; `tokens` the decoded pieces of text.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    tokens: list[str]
