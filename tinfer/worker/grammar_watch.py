"""How long grammars may be compiled.

vLLM compiles them on a few threads beside the steps, for as long as it takes, and nobody can stop
such a thread. So whoever asked for a slow one is refused, and a worker whose threads do not come
back while others wait for them ends: it is started again, and what it had goes on elsewhere.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

# Source: vLLM waits 5 s for a regular expression (VLLM_REGEX_COMPILATION_TIMEOUT_S). A schema of
# the largest size took 0.6 s with a vocabulary of 260 tokens (xgrammar 0.2.8, one AMD EPYC core,
# November 2026), and takes longer with a larger one.
MAX_COMPILE_S = 30.0
MAX_BLOCKED_S = 120.0


class GrammarsStuck(Exception):
    """The threads that compile grammars do not come back."""


class GrammarWatch:
    """The compilations under way, by when they were first seen to run."""

    def __init__(
        self, max_compile_s: float = MAX_COMPILE_S, max_blocked_s: float = MAX_BLOCKED_S
    ) -> None:
        self._max_compile_s = max_compile_s
        self._max_blocked_s = max_blocked_s
        self._began_s: dict[Future[Any], float] = {}

    def is_too_slow(self, work: Future[Any], now_s: float) -> bool:
        """Whether a request that waits for `work` should wait no longer.

        What waits for a thread is not at fault. Raises `GrammarsStuck` if it waits for one that has
        had the same work for too long.
        """
        if work.done():
            self._began_s.pop(work, None)
            return False
        if work.running():
            return now_s - self._began_s.setdefault(work, now_s) > self._max_compile_s
        for other, began_s in list(self._began_s.items()):
            if other.done():
                del self._began_s[other]
            elif now_s - began_s > self._max_blocked_s:
                raise GrammarsStuck(f"a grammar is being compiled for {now_s - began_s:.0f} s")
        return False
