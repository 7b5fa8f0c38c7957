"""The latest engine steps of one worker, as far as its messages tell of them: 64 bytes for each.

A message comes after a step that emitted or finished a chunk, with totals of the incarnation; what
lies between two messages is their difference. Nothing here costs more with more tokens in a step.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from tinfer.wire.messages import WorkerStats

# 1 MiB for each worker; at 100 steps a second the last 160 seconds.
MAX_ROWS = 16384
_ROW = struct.Struct("8d")
_NOTHING = WorkerStats()


class Steps(NamedTuple):
    """What one message told: what was done since the one before, and what the engine holds now.

    `busy_s` were spent in `num_steps` steps, which end with the message, at `end_s`; they computed
    `prompt_tokens` tokens of prompts, and the last one emitted tokens of `num_emitting` requests.
    """

    end_s: float
    busy_s: float
    num_steps: float
    prompt_tokens: float
    num_emitting: float
    num_running: float
    num_waiting: float
    num_used_blocks: float


class StepRing:
    """The last `max_rows` messages of a worker, over all its incarnations."""

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._rows = bytearray(max_rows * _ROW.size)
        self._num_added = 0
        self._generation = -1
        self._last = _NOTHING

    def add(self, generation: int, stats: WorkerStats, num_emitting: int, now_s: float) -> None:
        """A message of that incarnation came at `now_s`."""
        last = self._last if generation == self._generation else _NOTHING
        self._generation, self._last = generation, stats
        _ROW.pack_into(
            self._rows,
            self._num_added % self._max_rows * _ROW.size,
            now_s,
            stats.busy_s - last.busy_s,
            stats.num_steps - last.num_steps,
            stats.num_computed_prompt_tokens - last.num_computed_prompt_tokens,
            num_emitting,
            stats.num_running,
            stats.num_waiting,
            stats.num_used_blocks,
        )
        self._num_added += 1

    def copy(self, since_s: float = 0.0) -> bytes:
        """The rows that came at `since_s` or later, the oldest first, for `read`."""
        oldest = max(0, self._num_added - self._max_rows)
        numbers = range(oldest, self._num_added)
        first = oldest + bisect_left(numbers, since_s, key=self._end_s)
        if first == self._num_added:
            return b""
        start, end = self._place(first), self._place(self._num_added)
        rows = self._rows
        return bytes(rows[start:end] if start < end else rows[start:] + rows[:end])

    def _place(self, number: int) -> int:
        """Where the row of that number lies, in bytes."""
        return number % self._max_rows * _ROW.size

    def _end_s(self, number: int) -> float:
        end_s: float = _ROW.unpack_from(self._rows, self._place(number))[0]
        return end_s


def read(rows: bytes) -> Iterator[Steps]:
    """What `StepRing.copy` gave, row by row."""
    return map(Steps._make, _ROW.iter_unpack(rows))
