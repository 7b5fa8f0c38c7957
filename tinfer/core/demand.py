"""What the workload asks of the two phases lately, as exponentially fading rates."""

from __future__ import annotations

import math

from tinfer.core.costs import CostModel
from tinfer.core.requests import Request


class Demand:
    """Prompt and answer tokens that arrive per second, by what arrived in the last `memory_s`.

    Rates fade towards 0 while nothing arrives. Times never go back.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._prompt_tokens = 0.0
        self._output_tokens = 0.0
        self._num_requests = 0.0
        self._at_s = 0.0
        self._since_s: float | None = None

    def arrived(self, request: Request, uncached_tokens: int, now_s: float) -> None:
        """Count a request, with what no cache has of its prompt."""
        if self._since_s is None:
            self._since_s = now_s
        self._fade(now_s)
        self._num_requests += 1.0
        self._prompt_tokens += uncached_tokens
        self._output_tokens += request.expected_tokens

    def rates(self, now_s: float) -> tuple[float, float, float]:
        """Requests, prompt tokens and output tokens per second; 0 before anything arrived."""
        if self._since_s is None:
            return (0.0, 0.0, 0.0)
        self._fade(now_s)
        # The weights' integral so far: in its first moments a window is not filled yet.
        seen_s = self._memory_s * (1.0 - math.exp((self._since_s - now_s) / self._memory_s))
        seen_s = max(seen_s, 1e-3)
        return (
            self._num_requests / seen_s,
            self._prompt_tokens / seen_s,
            self._output_tokens / seen_s,
        )

    def prefill_part(self, costs: CostModel, batch: int, now_s: float) -> float | None:
        """Of the work that arrives, the part that prefill is, in seconds of a worker; None without
        any. An output token costs its share of a step of `batch` sequences.
        """
        _, prompt_rate, output_rate = self.rates(now_s)
        prefill = prompt_rate * costs.prefill_token_s
        decode = output_rate * costs.decode_step_s(batch, 0) / batch
        return None if prefill + decode <= 0 else prefill / (prefill + decode)

    def _fade(self, now_s: float) -> None:
        factor = math.exp((self._at_s - now_s) / self._memory_s)
        self._prompt_tokens *= factor
        self._output_tokens *= factor
        self._num_requests *= factor
        self._at_s = now_s
