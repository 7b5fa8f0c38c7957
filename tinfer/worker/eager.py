"""A CPU worker compiles nothing while it serves."""

from __future__ import annotations

import torch


def compute_eagerly() -> None:
    """Run what is marked for `torch.compile` as it stands, in this process and from here on.

    `enforce_eager` leaves out vLLM's own compilation alone. Of what it marks besides, the ranks of
    tokens are computed for whoever first asks for log probabilities: all streams of that worker
    stood still for 20 to 30 s of g++ (November 2026, two busy AMD EPYC cores), for a comparison and
    a sum. A part of the embedding, marked where it is split between ranks, took 2 s. No compiler
    is needed then either.
    """
    torch.compiler.set_stance("force_eager")
