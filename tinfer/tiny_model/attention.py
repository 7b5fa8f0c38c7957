"""Causal attention for training on CPU cores: plain matrix products over blocks of queries.

torch's fused attention on CPUs is made for serving: its backward pass takes three to seven times as
long as these few products for the lengths of our conversations (24 to 900 tokens, heads of 32).
Blocks of queries leave out most of the scores that causality masks, and what they hold stays in the
cores' caches.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "causal_blocks"
# Of 64, 128 and 256 the fastest at every length from 24 to 900 tokens on two cores.
BLOCK_QUERIES = 128


@cache
def _mask(start: int, end: int, num_groups: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of queries `start` to `end` over all keys up to `end`:
    `[num_groups * (end - start), end]`, minus infinity at keys after the query."""
    one = torch.full((end - start, end), float("-inf")).triu(1 + start)
    return one.repeat(num_groups, 1).to(dtype)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Softmax attention in which token i sees tokens 0 to i.

    `query` is `[batch, num_heads, tokens, head_size]`, `key` and `value` have `num_kv_heads` heads,
    each shared by as many query heads in a row. Returns `query`'s shape and dtype.
    """
    batch, num_heads, num_tokens, size = query.shape
    num_kv_heads = key.shape[1]
    groups = num_heads // num_kv_heads
    scaled = (query * scaling).reshape(batch, num_kv_heads, groups, num_tokens, size)
    transposed = key.transpose(-1, -2)
    blocks = []
    for start in range(0, num_tokens, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, num_tokens)
        rows = scaled[:, :, :, start:end].reshape(batch, num_kv_heads, -1, size)
        scores = rows @ transposed[..., :end] + _mask(start, end, groups, query.dtype)
        attended = torch.softmax(scores, -1) @ value[:, :, :end]
        blocks.append(attended.reshape(batch, num_heads, end - start, size))
    return torch.cat(blocks, 2)


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The form that transformers calls. The mask is not needed: padding stands on the right."""
    dtype = value.dtype
    with torch.autocast("cpu", enabled=False):
        attended = causal_attention(query.to(dtype), key.to(dtype), value, scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _for_transformers)
