"""The lease table against a model of it: owner, two readers and a supervisor, slots reused."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from tinfer.worker.kv.errors import LeaseNotOpen, LeaseTableFull
from tinfer.worker.kv.lease import LeaseRef, LeaseTable

NUM_SLOTS = 3


@dataclass
class Model:
    num_readers: int
    deadline_ns: int
    ready: bool
    done: set[int] = field(default_factory=set)
    released: bool = False
    reported_ended: bool = False
    reported_deadline_ns: int | None = None

    def has_ended(self) -> bool:
        return self.released or self.done >= set(range(self.num_readers))


class LeaseMachine(RuleBasedStateMachine):
    leases = Bundle("leases")
    closed = Bundle("closed")

    @initialize()
    def start(self) -> None:
        self.now_ns = 0
        self.table = LeaseTable.create(NUM_SLOTS, clock_ns=lambda: self.now_ns)
        self.peer = LeaseTable.attach(self.table.descriptor())
        self.open: dict[LeaseRef, Model] = {}
        self.seen: set[LeaseRef] = set()

    @rule(target=leases, ttl_s=st.integers(0, 3), ranks=st.integers(1, 2), ready=st.booleans())
    def open_lease(self, ttl_s: int, ranks: int, ready: bool) -> object:
        deadline_s = self.now_ns / 1e9 + ttl_s
        if len(self.open) == NUM_SLOTS:
            with pytest.raises(LeaseTableFull):
                self.table.open_lease(deadline_s, ranks)
            return multiple()
        ref = self.table.open_lease(deadline_s, ranks, ready=ready)
        assert ref not in self.seen, "a slot never carries a generation twice"
        assert ref.slot not in {other.slot for other in self.open}
        self.seen.add(ref)
        self.open[ref] = Model(ranks, int(deadline_s * 1e9), ready)
        return ref

    @rule(ref=leases, rank=st.integers(0, 1))
    def reader_is_done(self, ref: LeaseRef, rank: int) -> None:
        self.peer.mark_done(ref, rank)
        self.open[ref].done.add(rank)

    @rule(ref=leases, by_owner=st.booleans())
    def release(self, ref: LeaseRef, by_owner: bool) -> None:
        (self.table if by_owner else self.peer).release(ref)
        self.open[ref].released = True

    @rule(ref=leases, by_owner=st.booleans(), ttl_s=st.integers(0, 3))
    def extend(self, ref: LeaseRef, by_owner: bool, ttl_s: int) -> None:
        deadline_s = self.now_ns / 1e9 + ttl_s
        (self.table if by_owner else self.peer).extend(ref, deadline_s)
        self.open[ref].deadline_ns = int(deadline_s * 1e9)

    @rule(ref=leases, by_owner=st.booleans())
    def becomes_ready(self, ref: LeaseRef, by_owner: bool) -> None:
        for rank in (0, 1):
            (self.table if by_owner else self.peer).mark_ready(ref, rank)
        self.open[ref].ready = True

    @rule(target=closed, ref=consumes(leases))
    def close_lease(self, ref: LeaseRef) -> LeaseRef:
        self.table.close_lease(ref)
        del self.open[ref]
        return ref

    @rule(ref=closed)
    def nothing_touches_a_closed_lease(self, ref: LeaseRef) -> None:
        """Its slot may carry another lease by now, which must not notice."""
        self.peer.mark_done(ref, 0)
        self.peer.mark_done(ref, 1)
        self.peer.release(ref)
        self.peer.mark_ready(ref)
        self.peer.extend(ref, 0.0)
        for call in (self.table.close_lease, self.table.release):
            with pytest.raises(LeaseNotOpen):
                call(ref)

    @rule(seconds=st.integers(1, 2))
    def time_passes(self, seconds: int) -> None:
        self.now_ns += seconds * 10**9

    @rule()
    def poll(self) -> None:
        ended, overdue = self.table.poll()
        for ref, lease in self.open.items():
            expect_ended = lease.has_ended() and not lease.reported_ended
            expect_overdue = (
                not lease.has_ended()
                and lease.deadline_ns < self.now_ns
                and lease.deadline_ns != lease.reported_deadline_ns
            )
            assert (ref in ended) == expect_ended
            assert (ref in overdue) == expect_overdue
            lease.reported_ended |= expect_ended
            if expect_overdue:
                lease.reported_deadline_ns = lease.deadline_ns
        assert {*ended, *overdue} <= set(self.open)

    @invariant()
    def validity_is_openness(self) -> None:
        assert self.table.num_open == len(self.open)
        for ref in self.seen:
            assert self.peer.is_valid(ref) == (ref in self.open)
            lease = self.open.get(ref)
            assert self.peer.is_ready(ref) == (lease is not None and lease.ready)
            deadline_s = None if lease is None else lease.deadline_ns / 1e9
            assert self.peer.deadline_s(ref) == deadline_s

    def teardown(self) -> None:
        self.peer.close()
        self.table.close()


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=60, stateful_step_count=40)
