"""A request that lost its blocks: where they are computed again, and what if they are not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.core_box import Box
from tinfer.core.costs import CostModel
from tinfer.core.events import (
    AbortOn,
    Action,
    Cancelled,
    FirstToken,
    LeaseEnded,
    Prefilled,
    Pulled,
    ReleaseLease,
    Resume,
    StartReprefill,
    Stepped,
    WorkerDown,
    WorkerFinished,
)
from tinfer.core.policies.registry import DECODE_ADMISSIONS
from tinfer.core.types import Capacity, LeaseKey, Phase

AGAIN = "r~0"
KEY = LeaseKey("p", 0, 7, 7)
HERE = Resume("r", "d", 0)
CAPACITY = Capacity(num_blocks=100, block_tokens=16, max_num_seqs=4, chunk_tokens=512)


def decoding(preemption: str = "elsewhere", roles: str = "p d", **config: Any) -> Box:
    """A box in which "r" decodes on "d" and its first lease is over."""
    box = Box(roles, CAPACITY, preemption=preemption, **config)
    box.arrive(prompt=320, out=64)
    box.prefilled()
    box.on(Pulled("r", "d", 0, ok=True), LeaseEnded(LeaseKey("p", 0, 0, 0)))
    return box


def lost(
    box: Box, num_steps: int = 10, request_id: str = "r", worker_id: str = "d"
) -> list[Action]:
    return box.on(
        Stepped(worker_id, 0, num_steps, 0.1, 0, 0, preempted=(request_id,)),
    )


def test_prompt_and_answer_are_prefilled_elsewhere_and_read_from_there() -> None:
    box = decoding()
    assert lost(box) == [StartReprefill(AGAIN, "r", "p", 0)]
    assert box.worker("p").outstanding_prefill_tokens == 320 + 11
    assert box.worker("d").num_reprefilled == box.worker("d").num_preempted == 1
    assert box.on(Prefilled(AGAIN, "p", 0, KEY, 21)) == [Resume("r", "d", 0, KEY)]
    assert box.worker("p").outstanding_prefill_tokens == 0
    assert box.scheduler.ledger_snapshot().pulls == 1
    assert box.on(Pulled("r", "d", 0, ok=True), LeaseEnded(KEY)) == []
    ledger = box.scheduler.ledger_snapshot()
    assert ledger.pulls == ledger.leases == ledger.zombies == 0
    # It can happen to it again, and a person who asks is told.
    assert lost(box, 20) == [StartReprefill("r~1", "r", "p", 0)]
    (waiting,) = box.scheduler.waiting(0.0)
    assert (waiting.request_id, waiting.reason) == ("r", "lost its KV on d; p computes it again")


@pytest.mark.parametrize(
    "end",
    [WorkerFinished(AGAIN, "p", 0, answered=False, refused=True), WorkerDown("p", 0)],
    ids=["refused", "dead"],
)
def test_without_the_other_worker_it_computes_its_tokens_itself(end: Any) -> None:
    box = decoding()
    lost(box)
    assert box.on(end) == [HERE]
    assert box.scheduler.ledger_snapshot().zombies == 0


def test_nobody_computes_for_a_request_that_is_gone() -> None:
    box = decoding()
    lost(box)
    assert box.on(Cancelled("r")) == [AbortOn("r", "d", 0), AbortOn(AGAIN, "p", 0)]
    # The blocks were there before the abort.
    assert box.on(Prefilled(AGAIN, "p", 0, KEY, 21)) == [ReleaseLease(KEY)]
    box.on(LeaseEnded(KEY), WorkerFinished("r", "d", 0, answered=False))
    assert box.scheduler.ledger_snapshot().is_zero


def test_nor_for_one_whose_worker_is_dead() -> None:
    box = decoding()
    lost(box)
    assert AbortOn(AGAIN, "p", 0) in box.on(WorkerDown("d", 0))
    box.on(WorkerFinished(AGAIN, "p", 0, answered=False))
    assert box.phase() is Phase.PREFILLING  # it begins again itself
    box.on(FirstToken("r", "p", 0), WorkerFinished("r", "p", 0, answered=True))
    assert box.scheduler.ledger_snapshot().is_zero


@pytest.mark.parametrize("roles", ["d", "b bb"])
def test_where_nobody_may_hand_off_it_stays(roles: str) -> None:
    """Two workers of both phases are replicas of each other: neither waits for the other's room."""
    box = Box(roles, CAPACITY, preemption="elsewhere")
    (start, *_) = box.arrive(prompt=320, out=64)
    at: Any = start
    box.on(FirstToken("r", at.worker_id, 0))
    assert lost(box, worker_id=at.worker_id) == [Resume("r", at.worker_id, 0)]


def test_a_prompt_that_lost_its_blocks_computes_them_where_it_is() -> None:
    box = Box("p d", CAPACITY, preemption="elsewhere")
    box.arrive(prompt=320, out=64)
    assert lost(box, worker_id="p") == [Resume("r", "p", 0)]


@pytest.mark.parametrize(
    ("handoff_token_s", "outcome"), [(0.0, StartReprefill(AGAIN, "r", "p", 0)), (1.0, HERE)]
)
def test_auto_goes_by_what_moving_costs(handoff_token_s: float, outcome: Action) -> None:
    """An idle prefill worker computes it sooner than one that decodes, if the way is not long."""
    costs = CostModel(handoff_token_s=handoff_token_s)
    assert lost(decoding("auto", costs=costs)) == [outcome]


def test_auto_stays_where_the_other_worker_is_busy() -> None:
    box = decoding("auto", costs=CostModel(handoff_token_s=0.0))
    box.arrive("long", prompt=1400)
    assert lost(box) == [HERE]


def test_a_request_without_blocks_keeps_nobody_out() -> None:
    """Who waits for room here may hold the blocks that its prefill needs elsewhere."""
    small = Capacity(num_blocks=30, block_tokens=16, max_num_seqs=4, chunk_tokens=512)
    box = Box("p d", small, preemption="elsewhere", decode_admission="peak")
    box.arrive(prompt=320, out=64)
    box.prefilled()
    box.on(Pulled("r", "d", 0, ok=True), LeaseEnded(LeaseKey("p", 0, 0, 0)))
    box.arrive("s", prompt=320, out=64)
    assert box.prefilled("s", slot=1) == []
    assert StartReprefill(AGAIN, "r", "p", 0) in lost(box)
    assert box.worker("d").num_used_blocks == 21  # those of the other alone
    assert box.phase("s") is Phase.HANDOFF and box.scheduler.ledger_snapshot().pulls == 1


@pytest.mark.parametrize("admission", DECODE_ADMISSIONS)
def test_a_worker_with_nothing_but_requests_without_blocks_takes_anything(admission: str) -> None:
    """Its prefill waits for the blocks of one that is larger than the cache will hold, and nobody
    is left here whose end could make room for that."""
    small = Capacity(num_blocks=30, block_tokens=16, max_num_seqs=4, chunk_tokens=512)
    box = Box("p d", small, preemption="elsewhere", decode_admission=admission)
    box.arrive(prompt=320, out=64)
    box.prefilled()
    box.on(Pulled("r", "d", 0, ok=True), LeaseEnded(LeaseKey("p", 0, 0, 0)))
    box.arrive("large", prompt=470, out=64)
    assert box.prefilled("large", slot=1) == []
    assert StartReprefill(AGAIN, "r", "p", 0) in lost(box)
    assert box.scheduler.ledger_snapshot().pulls == 1
