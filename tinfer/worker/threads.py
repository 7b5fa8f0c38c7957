"""How many threads a CPU worker, or each of its ranks, computes with."""

from __future__ import annotations

import torch


def set_threads(num_threads: int) -> None:
    """Compute with that many OpenMP threads from here on; only before the first parallel region.

    The environment variable would come too late: OpenMP read it in the process that this one was
    forked from.
    """
    if num_threads != torch.get_num_threads():
        torch.set_num_threads(num_threads)
