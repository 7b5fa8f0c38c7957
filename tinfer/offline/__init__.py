"""`tinfer.LLM`: a model for scripts, without a server to be seen. See `LLM` for how to use it."""

from __future__ import annotations

from tinfer.offline.llm import LLM
from tinfer.offline.outputs import CompletionOutput, Logprob, RequestOutput
from tinfer.offline.params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]
