"""Workers whose KV blocks differ are not paired, and the reason is said."""

from __future__ import annotations

import pytest

from tinfer.core.types import Role
from tinfer.master.pairing import Worker, difference, pair

P, D, B, W = Role.PREFILL, Role.DECODE, Role.BOTH, Role.WHOLE
BF16 = {"dtype": "bfloat16", "block_tokens": "128"}
FP16 = {"dtype": "float16", "block_tokens": "128"}
WIDE = {"dtype": "bfloat16", "block_tokens": "64"}


def test_like_workers_keep_their_roles() -> None:
    pairs = pair([("p", P, BF16), ("d", D, BF16)])
    assert (pairs.roles, pairs.notes, pairs.can_split) == ({"p": P, "d": D}, [], True)


def test_the_largest_set_that_can_split_does() -> None:
    workers: list[Worker] = [
        ("p0", P, FP16),
        ("p1", P, FP16),
        ("p2", P, FP16),
        ("p3", P, BF16),
        ("d0", D, BF16),
    ]
    pairs = pair(workers)
    assert pairs.roles == {"p0": W, "p1": W, "p2": W, "p3": P, "d0": D}
    assert len(pairs.notes) == 3
    assert pairs.notes[0] == (
        "p0 is not paired and computes whole requests only: dtype float16, not bfloat16"
    )
    assert pairs.can_split


def test_where_none_fit_all_compute_whole_requests() -> None:
    pairs = pair([("p", P, BF16), ("d", D, WIDE)])
    assert not pairs.can_split
    assert pairs.why_not == "KV blocks of p and d do not fit: block tokens 64, not 128"
    assert pairs.notes == [f"every worker computes whole requests: {pairs.why_not}"]
    assert W in pairs.roles.values()


@pytest.mark.parametrize("roles", [[P], [B], [B, B], [P, P], [D, D]])
def test_one_phase_alone_cannot_split_and_is_no_surprise(roles: list[Role]) -> None:
    pairs = pair([(f"w{i}", role, BF16) for i, role in enumerate(roles)])
    assert (pairs.can_split, pairs.notes) == (False, [])
    assert pairs.roles == {f"w{i}": role for i, role in enumerate(roles)}


@pytest.mark.parametrize("roles", [[P, B], [B, D], [P, D]])
def test_pairs_that_the_scheduler_makes(roles: list[Role]) -> None:
    assert pair([(f"w{i}", role, BF16) for i, role in enumerate(roles)]).can_split


def test_the_next_incarnation_is_held_against_those_that_are_paired() -> None:
    pairs = pair([("p", P, BF16), ("d", D, BF16)])
    assert pairs.role_of(D, dict(BF16)) is D
    assert pairs.role_of(D, WIDE) is W


def test_a_difference_is_named_also_where_one_does_not_say() -> None:
    assert difference({"dtype": "a"}, {}) == "dtype unknown, not a"
    assert difference({}, {"layout": "x"}) == "layout x, not unknown"
