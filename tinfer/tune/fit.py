"""From measured points to the constants of a `CostModel`.

A step is a sum of five terms with constants that cannot be negative. The fit minimises the squares
of the *relative* errors, since a millisecond too much matters to a decode step and not to a prefill
of a second. Mixed steps are kept out of it: how well it foretells them shows whether costs add.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from tinfer.core.costs import CostModel
from tinfer.tune.points import HandoffPoint, StepKind, StepPoint

FITTED: tuple[StepKind, ...] = ("prefill", "later-chunk", "decode")
KINDS: tuple[StepKind, ...] = (*FITTED, "mixed")


class Fit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The constants, and how far they are from what was measured.

    `errors` are mean absolute relative errors, by kind of step and `handoff`; a kind that was not
    measured is left out. `handoff_measured` is false where there was one worker only: the constants
    of a hand-off are then the defaults of `CostModel`.
    """

    costs: CostModel
    errors: dict[str, float]
    handoff_measured: bool


def fit(steps: Sequence[StepPoint], handoffs: Sequence[HandoffPoint], source: str) -> Fit:
    """The constants; `source` is for a reader. Raises `ValueError` if there is no step to fit."""
    fitted = [point for point in steps if point.kind in FITTED]
    if not fitted:
        raise ValueError("no steps to fit")
    base_s, prefill_s, context_s, decode_s, kv_s = least_squares(
        [_terms(point) for point in fitted], [point.step_s for point in fitted]
    )
    costs = CostModel(
        base_s=base_s,
        prefill_token_s=prefill_s,
        prefill_context_s=context_s,
        decode_seq_s=decode_s,
        kv_token_s=kv_s,
        source=source,
    )
    if handoffs:
        costs = _with_handoff(costs, handoffs)
    return Fit(costs=costs, errors=_errors(costs, steps, handoffs), handoff_measured=bool(handoffs))


def least_squares(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Non-negative weights of the columns with the least squares of the relative errors.

    `seconds` are positive. The best weights are the plain least-squares solution over the columns
    that are not zero in them, so of all subsets of the columns (2**columns: a handful) the one with
    the least error whose solution has no negative weight is it.
    """
    target = np.asarray(seconds, dtype=float)
    table = np.asarray(rows, dtype=float) / target[:, None]
    scales = np.linalg.norm(table, axis=0)
    scales[scales == 0.0] = 1.0
    table = table / scales
    ones = np.ones(len(target))
    num_columns = table.shape[1]
    best, least = np.zeros(num_columns), float(len(target))
    for size in range(1, num_columns + 1):
        for columns in map(list, itertools.combinations(range(num_columns), size)):
            weights, *_ = np.linalg.lstsq(table[:, columns], ones, rcond=None)
            error = float(np.sum((table[:, columns] @ weights - ones) ** 2))
            if weights.min() >= 0.0 and error < least:
                best, least = np.zeros(num_columns), error
                best[columns] = weights
    return [float(weight) for weight in best / scales]


def predicted_s(costs: CostModel, point: StepPoint) -> float:
    """What the constants say of a step like this one."""
    return costs.step_s(
        point.prefill_tokens, point.num_decodes, point.kv_tokens, point.context_tokens
    )


def relative_error(predicted: float, measured: float) -> float:
    """Positive where the prediction is too much."""
    return predicted / measured - 1.0


def _terms(point: StepPoint) -> tuple[float, ...]:
    return (
        1.0,
        point.prefill_tokens,
        point.context_tokens,
        point.num_decodes,
        point.kv_tokens,
    )


def _with_handoff(costs: CostModel, handoffs: Sequence[HandoffPoint]) -> CostModel:
    fixed_s, token_s = least_squares(
        [(1.0, point.tokens) for point in handoffs], [point.handoff_s for point in handoffs]
    )
    return CostModel(
        base_s=costs.base_s,
        prefill_token_s=costs.prefill_token_s,
        prefill_context_s=costs.prefill_context_s,
        decode_seq_s=costs.decode_seq_s,
        kv_token_s=costs.kv_token_s,
        handoff_s=fixed_s,
        handoff_token_s=token_s,
        source=costs.source,
    )


def _errors(
    costs: CostModel, steps: Sequence[StepPoint], handoffs: Sequence[HandoffPoint]
) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for point in steps:
        error = relative_error(predicted_s(costs, point), point.step_s)
        found.setdefault(point.kind, []).append(abs(error))
    for handoff in handoffs:
        error = relative_error(costs.handoff_total_s(handoff.tokens), handoff.handoff_s)
        found.setdefault("handoff", []).append(abs(error))
    return {kind: sum(errors) / len(errors) for kind, errors in found.items()}
