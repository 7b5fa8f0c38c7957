"""bfloat16 where the CPU multiplies it fast, float32 where it does not.

Without AVX-512 a product in bfloat16 takes 60 times as long as in float32 (torch 2.13, AMD EPYC
7003), and a step of the training 20 s and more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon

HAS_FAST_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def orthogonalize_in_float32() -> None:
    """Have `torch.optim.Muon`, which does it in bfloat16, do without where that is slow."""
    if not HAS_FAST_BFLOAT16:
        muon: Any = _muon
        muon._zeropower_via_newtonschulz = orthogonalized


def orthogonalized(
    update: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    """The nearest orthogonal matrix of a 2-D one, about, by a quintic Newton-Schulz iteration in
    float32. Source: K. Jordan, Muon (github.com/KellerJordan/Muon), as in torch.optim.Muon."""
    is_tall = update.size(0) > update.size(1)
    found: Tensor = (update.T if is_tall else update).float()
    found = found / found.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(num_steps):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.T if is_tall else found
