"""Keeps a second worker busy while the first one is measured.

Under load all workers of a box compute at the same time, and each is slower than alone: engines on
one CPU share its memory and its caches, workers of GPUs the cores that drive them. Costs that were
measured alone promise what no busy box keeps.
"""

from __future__ import annotations

import random

from tinfer.errors import StartError
from tinfer.tune.points import KvRoom
from tinfer.tuner.design import USED_SHARE
from tinfer.tuner.driver import Received, Workers, fixed_length, random_prompt
from tinfer.wire import messages as wire

# Prompts that take about as long as the decode steps behind them, on a CPU; less of a GPU's time.
NUM_SEQUENCES = 8
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 32


class Neighbour:
    """Requests without end on one worker, which has `room`: prompts and decode steps in turns.

    Whoever receives the box's messages hands over those of this worker (`heard`), at least while a
    measurement waits for its own. Nothing runs before `begin` and after `end`.
    """

    def __init__(self, workers: Workers, worker_id: str, room: KvRoom, rng: random.Random) -> None:
        self._workers = workers
        self._worker_id = worker_id
        self._rng = rng
        self._left: set[str] = set()
        self._num_started = 0
        self._goes_on = False
        self._num = min(NUM_SEQUENCES, room.max_num_seqs)
        most = min(room.max_model_len, int(USED_SHARE * room.num_tokens) // self._num)
        self._prompt_tokens = max(1, min(PROMPT_TOKENS, most // 2))
        self._output_tokens = max(1, min(OUTPUT_TOKENS, most - self._prompt_tokens - 1))

    def begin(self) -> None:
        self._goes_on = True
        self._start()

    def heard(self, received: Received) -> None:
        """A message of any worker. Raises `StartError` if the engine refuses what it is given."""
        if received.worker_id != self._worker_id:
            return
        message = received.message
        if isinstance(message, wire.Refused):
            raise StartError(f"the engine refused a measurement: {message.message}")
        if isinstance(message, wire.Step):
            ended = (one.request_id for one in message.outputs if one.finish_reason is not None)
            self._left.difference_update(ended)
            if self._goes_on and not self._left:
                self._start()

    async def end(self) -> None:
        """Returns when the worker is idle. Raises `StartError`."""
        self._goes_on = False
        while self._left:
            self.heard(await self._workers.receive())

    def _start(self) -> None:
        vocab_size = self._workers.ready[self._worker_id].vocab_size
        for _ in range(self._num):
            self._num_started += 1
            request_id = f"neighbour/{self._num_started}"
            self._left.add(request_id)
            prompt = random_prompt(self._prompt_tokens, vocab_size, self._rng)
            sampling = fixed_length(self._output_tokens)
            self._workers.send(self._worker_id, wire.Start(request_id, "whole", prompt, sampling))
