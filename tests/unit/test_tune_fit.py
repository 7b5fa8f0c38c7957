"""From measured points to costs and to the chunk size."""

from __future__ import annotations

import random

import pytest

from tests.unit.tune_box import COSTS, handoff, point, points
from tinfer.core.costs import CostModel
from tinfer.tune.chunk import choose_chunk, in_blocks
from tinfer.tune.fit import fit, least_squares, predicted_s
from tinfer.tune.points import HandoffPoint, StepPoint

FIELDS = (
    "base_s",
    "prefill_token_s",
    "prefill_context_s",
    "decode_seq_s",
    "kv_token_s",
    "handoff_s",
    "handoff_token_s",
)


def test_exact_points_give_the_constants_back() -> None:
    found = fit(points(), [handoff(n) for n in (16, 512, 4096)], "a test")
    for name in FIELDS:
        assert getattr(found.costs, name) == pytest.approx(getattr(COSTS, name)), name
    assert found.costs.source == "a test" and found.handoff_measured
    assert set(found.errors) == {"prefill", "later-chunk", "decode", "mixed", "handoff"}
    assert max(found.errors.values()) < 1e-9


def test_noise_moves_the_constants_by_about_as_much() -> None:
    rng = random.Random(4)
    noisy = [
        StepPoint(
            kind=p.kind,
            prefill_tokens=p.prefill_tokens,
            context_tokens=p.context_tokens,
            num_decodes=p.num_decodes,
            kv_tokens=p.kv_tokens,
            samples_s=tuple(p.step_s * rng.uniform(0.97, 1.03) for _ in range(5)),
        )
        for p in points()
    ]
    found = fit(noisy, [], "a test")
    for name in FIELDS[:5]:
        assert getattr(found.costs, name) == pytest.approx(getattr(COSTS, name), rel=0.1), name
    assert 0 < found.errors["decode"] < 0.03


def test_mixed_steps_are_a_check_and_not_fitted() -> None:
    mixed = point("mixed", prefill=512, decodes=8, kv=1000.0, factor=2.0)
    without = fit([p for p in points() if p.kind != "mixed"], [], "a test")
    found = fit([*(p for p in points() if p.kind != "mixed"), mixed], [], "a test")
    assert found.costs == without.costs
    assert found.errors["mixed"] == pytest.approx(0.5)


def test_no_constant_is_negative() -> None:
    # Longer contexts that take less time: plain least squares would make that a negative cost.
    falling = [
        point("prefill", prefill=n, factor=1.0 - n / 20000.0) for n in (16, 64, 256, 1024, 4096)
    ]
    costs = fit([*falling, point("decode", decodes=4, kv=64.0)], [], "a test").costs
    assert min(getattr(costs, name) for name in FIELDS) >= 0.0
    assert costs.prefill_context_s < COSTS.prefill_context_s


def test_the_best_of_all_non_negative_weights() -> None:
    rng = random.Random(1)
    rows = [[1.0, rng.uniform(0, 9), rng.uniform(0, 9)] for _ in range(12)]
    seconds = [rng.uniform(1, 5) for _ in rows]

    def error(weights: list[float]) -> float:
        return sum(
            (sum(w * x for w, x in zip(weights, row, strict=True)) / s - 1.0) ** 2
            for row, s in zip(rows, seconds, strict=True)
        )

    found = least_squares(rows, seconds)
    assert min(found) >= 0.0
    for _ in range(300):
        other = [max(0.0, w + rng.gauss(0, 0.2)) for w in found]
        assert error(other) >= error(found) - 1e-12


def test_columns_of_zeros_weigh_nothing() -> None:
    assert least_squares([[1.0, 0.0], [1.0, 0.0]], [2.0, 2.0]) == pytest.approx([2.0, 0.0])


def test_without_a_second_worker_the_hand_off_keeps_its_defaults() -> None:
    found = fit(points(), [], "a test")
    assert not found.handoff_measured and "handoff" not in found.errors
    assert found.costs.handoff_s == CostModel().handoff_s
    assert found.costs.handoff_token_s == CostModel().handoff_token_s


def test_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match="no steps"):
        fit([point("mixed", prefill=4, decodes=1)], [], "a test")


def test_a_point_is_its_median_and_its_spread() -> None:
    step = StepPoint(kind="decode", samples_s=(1.0, 9.0, 2.0, 3.0, 1.5))
    assert step.step_s == 2.0 and step.spread == pytest.approx(0.75)
    assert StepPoint(kind="decode", samples_s=(1.0,)).spread == 0.0
    moved = HandoffPoint(tokens=1, num_bytes=1, samples_s=(3.0, 1.0), copy_samples_s=(0.5,))
    assert (moved.handoff_s, moved.copy_s) == (2.0, 0.5)


def curve(*points_of: tuple[int, float]) -> list[StepPoint]:
    """Prompts alone, from (tokens, tokens per second)."""
    return [
        StepPoint(kind="prefill", prefill_tokens=n, samples_s=(n / rate,)) for n, rate in points_of
    ]


def test_the_threshold_is_the_smallest_size_near_the_best_throughput() -> None:
    chunk = choose_chunk(curve((16, 10), (512, 94), (256, 94.9), (1024, 96), (2048, 100)), 16)
    assert (chunk.threshold_tokens, chunk.chunk_tokens) == (1024, 1024)
    assert chunk.best_tokens_per_s == pytest.approx(100.0) and chunk.is_saturated


def test_throughput_that_falls_again_leaves_the_threshold_before_its_peak() -> None:
    chunk = choose_chunk(curve((128, 50), (256, 96), (512, 100), (1024, 60)), 128)
    assert (chunk.threshold_tokens, chunk.chunk_tokens, chunk.is_saturated) == (256, 256, True)


def test_a_curve_that_still_grows_says_so() -> None:
    chunk = choose_chunk(curve((128, 50), (256, 80), (300, 100)), 16)
    assert (chunk.threshold_tokens, chunk.chunk_tokens, chunk.is_saturated) == (300, 304, False)


def test_other_kinds_of_steps_do_not_count() -> None:
    with pytest.raises(ValueError, match="no prefill"):
        choose_chunk([point("later-chunk", prefill=512), point("mixed", prefill=512)], 16)


@pytest.mark.parametrize(
    ("tokens", "block_tokens", "chunk_tokens"),
    [
        (16, 16, 128),
        (16, 100, 200),
        (130, 16, 144),
        (513, 128, 640),
        (9000, 16, 8192),
        (8192, 96, 8160),
        (100, 16384, 16384),
    ],
)
def test_chunks_are_whole_blocks_within_bounds(
    tokens: int, block_tokens: int, chunk_tokens: int
) -> None:
    assert in_blocks(tokens, block_tokens) == chunk_tokens


def test_predictions_are_those_of_the_cost_model() -> None:
    step = point("mixed", prefill=10, decodes=3, kv=50.0)
    assert predicted_s(COSTS, step) == COSTS.step_s(10, 3, 50.0, 50.0)
