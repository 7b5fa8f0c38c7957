"""OpenAI's logprob structures from those of the engine.

Mirrors vLLM 0.32: -inf becomes -9999, since JSON has no infinity; a position's candidates are the
sampled token and then the top ones, each token once, and a repeated one keeps its first place and
its last values, as in the dict that vLLM builds.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinfer.api.responses import (
    ChatLogprob,
    ChatLogprobEntry,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)
from tinfer.core.sampling import TokenLogprobs

MIN_LOGPROB = -9999.0


def completion_logprobs(
    positions: Sequence[TokenLogprobs | str],
    num_top: int,
    as_token_ids: bool,
    first_offset: int = 0,
) -> CompletionLogprobs:
    """The four lists of `/v1/completions`; a position without logprobs is its token's text.

    `top_logprobs` holds up to `num_top` + 1 candidates (all for -1), which share an entry when
    they decode alike. Offsets count the characters of the tokens from `first_offset` on.
    """
    result = CompletionLogprobs([], [], [], [])
    offset = first_offset
    for position in positions:
        if isinstance(position, str):
            token, logprob, top = position, None, None
        else:
            candidates = _candidates(position, as_token_ids)
            kept = candidates if num_top == -1 else candidates[: num_top + 1]
            token, logprob = candidates[0]
            top = dict(kept)
        result.tokens.append(token)
        result.token_logprobs.append(logprob)
        result.top_logprobs.append(top)
        result.text_offset.append(offset)
        offset += len(token)
    return result


def next_offset(logprobs: CompletionLogprobs, before: int) -> int:
    """Where the token after these starts; `before` when there are none."""
    if not logprobs.tokens:
        return before
    return logprobs.text_offset[-1] + len(logprobs.tokens[-1])


def chat_logprobs(
    positions: Sequence[TokenLogprobs], num_top: int, as_token_ids: bool
) -> ChatLogprobs:
    """The content list of a chat: of each position, the first `num_top` candidates (all for -1)."""
    content = []
    for position in positions:
        candidates = _candidates(position, as_token_ids)
        token, logprob = candidates[0]
        kept = candidates if num_top == -1 else candidates[:num_top]
        content.append(
            ChatLogprobEntry(
                token=token,
                logprob=logprob,
                # The text, even where ids stand in for it: vLLM does the same.
                bytes=_utf8(position.tokens[0]),
                top_logprobs=[ChatLogprob(text, value, _utf8(text)) for text, value in kept],
            )
        )
    return ChatLogprobs(content)


def prompt_logprobs(positions: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """One dict per prompt token, keyed by token id; None for the first, which nothing predicts."""
    return [
        None
        if p is None
        else {
            str(token_id): PromptLogprob(max(value, MIN_LOGPROB), rank, token)
            for token_id, value, rank, token in zip(
                p.token_ids, p.logprobs, p.ranks, p.tokens, strict=True
            )
        }
        for p in positions
    ]


def token_id_text(token_id: int) -> str:
    """How `return_tokens_as_token_ids` writes a token."""
    return f"token_id:{token_id}"


def _candidates(position: TokenLogprobs, as_token_ids: bool) -> list[tuple[str, float]]:
    by_id: dict[int, tuple[str, float]] = {}
    for token_id, value, token in zip(
        position.token_ids, position.logprobs, position.tokens, strict=True
    ):
        text = token_id_text(token_id) if as_token_ids else token
        by_id[token_id] = (text, max(value, MIN_LOGPROB))
    return list(by_id.values())


def _utf8(text: str) -> list[int]:
    return list(text.encode("utf-8", errors="replace"))
