"""How good predicted lengths were: figures of one predictor over the trials of a log.

Scored are answers that were served to their end or their bound; one that was cut by its bound has
the length of the bound, which is what a server has to make room for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from tinfer.core.lengths import Lengths
from tinfer.sim.prequential import Told, Trial

# The paper's granularities (arXiv 2401.11181, section 4.2.2), and one finer.
GRANULARITIES = (50, 100, 200, 400)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
# Of a longer log, so many answers evenly spread are compared in pairs.
MAX_RANKED = 3000
INTERVALS = (0.2, 0.4, 0.6, 0.8)

Floats = NDArray[np.floating[Any]]


class Score(Struct, frozen=True, kw_only=True):
    """Of one predictor. None where it cannot be told, as tau of answers that are all alike.

    `bucket_accuracy`: by tokens per bucket, the share of answers in the bucket of the predicted
    median. `kendall_tau`: tau-b between predicted mean and true length. `mae_tokens`: mean absolute
    error of the median. `pinball_tokens`: mean pinball loss over QUANTILES. `coverage`: by nominal
    share, the share of answers within that central interval; `width_80_tokens`: mean width of the
    one of 80 %. `predict_us`: median time of a prediction.
    """

    bucket_accuracy: dict[str, float]
    kendall_tau: float | None
    mae_tokens: float
    pinball_tokens: float
    coverage: dict[str, float]
    width_80_tokens: float
    predict_us: float

    @property
    def coverage_80(self) -> float:
        return self.coverage["0.8"]


def score(trials: Sequence[Trial], told: Sequence[Told], num_skipped: int = 0) -> Score:
    """The figures, but for the first `num_skipped` trials. `ValueError` if no answer is scored."""
    scored = [
        (trial, one)
        for trial, one in list(zip(trials, told, strict=True))[num_skipped:]
        if trial.is_whole and trial.output_tokens > 0
    ]
    if not scored:
        raise ValueError("no answer was served to its end or its bound")
    true = np.array([trial.output_tokens for trial, _ in scored], dtype=np.float64)
    means = np.array([one.lengths.mean_remaining() for _, one in scored])
    rows = np.array([quantiles(one.lengths) for _, one in scored])
    middle = rows[:, QUANTILES.index(0.5)]
    widths = [_within(scored, share) for share in INTERVALS]
    return Score(
        bucket_accuracy={
            str(size): float(np.mean(middle // size == true // size)) for size in GRANULARITIES
        },
        kendall_tau=kendall_tau(means, true),
        mae_tokens=float(np.abs(middle - true).mean()),
        pinball_tokens=float(pinball(rows, true).mean()),
        coverage={str(share): within for share, (within, _) in zip(INTERVALS, widths, strict=True)},
        width_80_tokens=widths[-1][1],
        predict_us=1e6 * median(one.predict_s for _, one in scored),
    )


def quantiles(lengths: Lengths, ranks: Sequence[float] = QUANTILES) -> Floats:
    """Of equally likely lengths, each in the middle of its share; linear between them."""
    num = len(lengths.points)
    return np.interp(ranks, (np.arange(num) + 0.5) / num, lengths.points)


def pinball(rows: Floats, true: Floats) -> Floats:
    """The loss of each quantile of QUANTILES, [num_trials, len(QUANTILES)]: for a token too few the
    rank, for one too many the rest. Source: Koenker and Bassett, 1978."""
    over = true[:, None] - rows
    ranks = np.array(QUANTILES)
    return np.maximum(ranks * over, (ranks - 1.0) * over)


def kendall_tau(predicted: Floats, true: Floats) -> float | None:
    """Kendall's tau-b: 1 where every pair is in the right order, 0 where that is chance, None where
    either side has no order. Of more than MAX_RANKED, of as many evenly spread."""
    num = len(true)
    if num > MAX_RANKED:
        places = np.arange(MAX_RANKED) * num // MAX_RANKED
        predicted, true = predicted[places], true[places]
    together, predicted_pairs, true_pairs = 0, 0, 0
    for place in range(len(true) - 1):
        one = np.sign(predicted[place + 1 :] - predicted[place])
        other = np.sign(true[place + 1 :] - true[place])
        together += int((one * other).sum())
        predicted_pairs += int(np.count_nonzero(one))
        true_pairs += int(np.count_nonzero(other))
    if not predicted_pairs or not true_pairs:
        return None
    return together / math.sqrt(predicted_pairs * true_pairs)


def _within(scored: Sequence[tuple[Trial, Told]], share: float) -> tuple[float, float]:
    """How many answers lie in the central interval of that share, and its mean width."""
    ranks = (0.5 - share / 2, 0.5 + share / 2)
    ends = np.array([quantiles(one.lengths, ranks) for _, one in scored])
    true: NDArray[Any] = np.array([trial.output_tokens for trial, _ in scored])
    # Quantiles lie between tokens, answers do not: half a token is no miss.
    inside = (ends[:, 0] - 0.5 <= true) & (true <= ends[:, 1] + 0.5)
    return float(inside.mean()), float((ends[:, 1] - ends[:, 0]).mean())
