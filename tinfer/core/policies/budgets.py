"""How many prompt tokens a worker's step may have: its role, as a number that changes any time.

A prefill delays what decodes beside it by what it computes, however it is cut: chunks only decide
in how many pieces. A large chunk is one long gap between two tokens of every neighbour, a small one
costs a further step's base. So a worker on which nothing decodes takes whole chunks, and on one
where something does, a step may take `itl_slack` times longer than without prompts; and as much
again for every prompt that waits, since where prompts queue up the bases are what the queue is
made of.
"""

from __future__ import annotations

import math

from tinfer.core.fleet import Fleet
from tinfer.core.worker import Worker

# Below this a step's base costs more than the smoothness brings.
MIN_TOKENS = 32


class WholeChunks:
    """As many as the engine takes, always: the paper's workers, and plain replicas."""

    def budget(self, worker: Worker) -> int | None:
        return None


class Slack:
    """Whole chunks where nothing decodes, else what fits into the slack, as a power of two.

    Powers of two change rarely: a message for every request that comes or goes would cost more
    than it brings.
    """

    def __init__(self, itl_slack: float, fleet: Fleet) -> None:
        self._itl_slack = itl_slack
        self._fleet = fleet

    def budget(self, worker: Worker) -> int | None:
        if not worker.num_decoding or worker.costs.prefill_token_s <= 0:
            return None
        num_waiting = self._fleet.num_queued / len(self._fleet.workers)
        num_waiting += max(0, len(worker.prefilling) - 1)
        slack_s = self._itl_slack * worker.step_s * (1.0 + num_waiting)
        tokens = slack_s / worker.costs.prefill_token_s
        if tokens >= worker.capacity.chunk_tokens:
            return None
        return max(MIN_TOKENS, 1 << round(math.log2(max(1.0, tokens))))
