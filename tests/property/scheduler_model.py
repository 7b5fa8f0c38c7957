"""Workers as the scheduler may meet them: processes that do anything their contract allows.

Each process has an inbox of actions and an outbox of events, both in order; what happens between
two processes is not ordered at all. Lease rows stand for shared memory: a reader marks a row done
by itself, and the owner frees a row that is done or released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tinfer.core.events import (
    AbortOn,
    Action,
    Event,
    ExtendLease,
    FirstToken,
    LeaseEnded,
    LeaseOpened,
    LeaseOverdue,
    Prefilled,
    Pulled,
    ReleaseLease,
    Resume,
    SetBudget,
    StartDecode,
    StartPrefill,
    StartReprefill,
    StartWhole,
    Stepped,
    WorkerFinished,
)
from tinfer.core.types import LeaseKey, Role, Route

Incarnation = tuple[str, int]
Start = StartPrefill | StartReprefill | StartWhole | StartDecode


@dataclass(eq=False)
class Row:
    """One lease row: `is_done` by its reader, `is_released` by its owner on the master's word."""

    key: LeaseKey
    is_done: bool = False
    is_released: bool = False


@dataclass(eq=False)
class Pull:
    """A read of `row`; `is_wanted` turns false when the request is aborted in mid-copy. `is_first`
    says that the answer begins with it: a preempted request has a part of its answer."""

    row: Row
    is_first: bool = True
    is_copying: bool = False
    is_wanted: bool = True


@dataclass(eq=False)
class Process:
    """One incarnation of a worker. `rows` is the shared memory of the whole box."""

    id: str
    generation: int
    role: Role
    rows: dict[LeaseKey, Row]
    is_alive: bool = True
    inbox: deque[Action] = field(default_factory=deque)
    outbox: deque[Event] = field(default_factory=deque)
    prefills: dict[str, bool] = field(default_factory=dict)  # request id -> whole
    pulls: dict[str, Pull] = field(default_factory=dict)
    decodes: dict[str, None] = field(default_factory=dict)
    # Lost their blocks and wait for a word; prompts as in `prefills`, None what decodes.
    parked: dict[str, bool | None] = field(default_factory=dict)
    num_leases: int = 0
    num_steps: int = 0

    def reads(self, key: LeaseKey) -> bool:
        """Whether this process reads that lease now or may still start to."""
        told = any(isinstance(a, StartDecode | Resume) and a.lease == key for a in self.inbox)
        return self.is_alive and (told or any(p.row.key == key for p in self.pulls.values()))

    def die(self) -> None:
        self.is_alive = False
        self.inbox.clear()
        for key in [key for key in self.rows if self._owns(key)]:
            del self.rows[key]

    def receive(self, choice: int) -> None:
        """Take one action from the inbox; choice 0 accepts, others may refuse."""
        action = self.inbox.popleft()
        match action:
            case StartPrefill() | StartReprefill() | StartWhole() | StartDecode():
                if choice:
                    self._refuse(action, marks_done=choice == 1)
                else:
                    self._start(action)
            case Resume(request_id, lease=key):
                self._resume(request_id, key)
            case AbortOn(request_id):
                self._abort(request_id)
            case ReleaseLease(key):
                if key in self.rows:
                    self.rows[key].is_released = True
            case ExtendLease() | SetBudget():
                pass
            case _:
                raise AssertionError(f"{action} sent to a worker")

    def steps(self) -> Sequence[Callable[[int], None]]:
        """Everything that this process could do next; each takes a choice, 0 being the good end."""
        ends = {True: self._end_whole_prefill, False: self._end_split_prefill}
        steps = [partial(ends[whole], rid) for rid, whole in self.prefills.items()]
        steps += [partial(self._pull, rid) for rid in self.pulls]
        steps += [partial(self._end_decode, rid) for rid in self.decodes]
        steps += [partial(self._step, rid) for rid in (*self.prefills, *self.decodes)]
        return steps + [partial(self._poll, key) for key in self.rows if self._owns(key)]

    def _owns(self, key: LeaseKey) -> bool:
        return (key.worker_id, key.worker_generation) == (self.id, self.generation)

    def report(self, num_steps: int, progress: tuple[tuple[str, int], ...], *lost: str) -> None:
        """Say how far it is; who is `lost` has no blocks any more."""
        self.num_steps += num_steps
        total = self.num_steps
        at = (self.id, self.generation)
        self.outbox.append(Stepped(*at, total, 0.01 * total, 3 * total, 2, progress, lost))

    def _step(self, rid: str, choice: int) -> None:
        """One more step, in which a request that decodes or is prefilled may lose its blocks."""
        if choice < 2:
            return
        if rid in self.decodes:
            self.parked[rid] = self.decodes.pop(rid)
        else:
            self.parked[rid] = self.prefills.pop(rid)
        self.report(1, (), rid)

    def _resume(self, rid: str, key: LeaseKey | None) -> None:
        if rid not in self.parked:
            if key is not None and key in self.rows:
                self.rows[key].is_done = True
            return
        whole = self.parked.pop(rid)
        if whole is not None:
            assert key is None
            self.prefills[rid] = whole
        elif key is None:
            self.decodes[rid] = None
        else:
            self.pulls[rid] = Pull(self.rows.get(key) or Row(key), is_first=False)

    def _start(self, action: Start) -> None:
        rid = action.prefill_id if isinstance(action, StartReprefill) else action.request_id
        assert rid not in {**self.prefills, **self.pulls, **self.decodes, **self.parked}
        match action:
            case StartDecode(lease=key):
                # A source that died leaves its memory mapped: read it as an unshared row.
                self.pulls[rid] = Pull(self.rows.get(key) or Row(key))
            case _:
                self.prefills[rid] = isinstance(action, StartWhole)

    def _refuse(self, action: Start, marks_done: bool) -> None:
        if isinstance(action, StartDecode) and marks_done and action.lease in self.rows:
            self.rows[action.lease].is_done = True
        rid = action.prefill_id if isinstance(action, StartReprefill) else action.request_id
        self._finish(rid, answered=False, refused=True)

    def _abort(self, rid: str) -> None:
        pull = self.pulls.get(rid)
        if pull is not None and pull.is_copying:
            pull.is_wanted = False
        elif pull is not None:
            pull.row.is_done = True
            del self.pulls[rid]
        elif rid in self.prefills:
            del self.prefills[rid]
        elif rid in self.decodes:
            del self.decodes[rid]
        elif rid in self.parked:
            del self.parked[rid]
        else:
            return  # it has just ended here
        self._finish(rid, answered=False)

    def _end_split_prefill(self, rid: str, choice: int) -> None:
        del self.prefills[rid]
        if choice == 0:
            key = self._open_row()
            self.outbox.append(Prefilled(rid, self.id, self.generation, key, 2))
            return
        if choice == 1:
            self.outbox.append(LeaseOpened(self._open_row(), 2))
        self._finish(rid, answered=choice != 3)
        if choice == 2:
            self.outbox.append(LeaseOpened(self._open_row(), 2))

    def _end_whole_prefill(self, rid: str, choice: int) -> None:
        del self.prefills[rid]
        if choice < 2:
            self.outbox.append(FirstToken(rid, self.id, self.generation))
            self.decodes[rid] = None
        else:
            self._finish(rid, answered=choice == 2)

    def _pull(self, rid: str, choice: int) -> None:
        pull = self.pulls[rid]
        if not pull.is_copying and choice < 2:
            pull.is_copying = True
            return
        pull.row.is_done = True
        del self.pulls[rid]
        self.outbox.append(Pulled(rid, self.id, self.generation, ok=choice == 0))
        if pull.is_wanted:
            if pull.is_first:
                self.outbox.append(FirstToken(rid, self.id, self.generation))
            self.decodes[rid] = None

    def _end_decode(self, rid: str, choice: int) -> None:
        del self.decodes[rid]
        self._finish(rid, answered=choice < 2)

    def _poll(self, key: LeaseKey, choice: int) -> None:
        row = self.rows[key]
        if row.is_done or row.is_released:
            del self.rows[key]
            self.outbox.append(LeaseEnded(key))
        else:
            self.outbox.append(LeaseOverdue(key))

    def _open_row(self) -> LeaseKey:
        self.num_leases += 1
        key = LeaseKey(self.id, self.generation, self.num_leases % 3, self.num_leases)
        self.rows[key] = Row(key)
        return key

    def _finish(self, rid: str, answered: bool, refused: bool = False) -> None:
        self.outbox.append(WorkerFinished(rid, self.id, self.generation, answered, refused))


@dataclass(eq=False)
class Book:
    """What must be true of one accepted request, by the events and actions seen so far."""

    seq: int
    wish: Route
    at: Incarnation | None = None
    is_open: bool = True
    is_started: bool = False
    is_pulling: bool = False
    outstanding_tokens: int = 0
    prompt_tokens: int = 0
    lease: LeaseKey | None = None
    num_aborts: int = 0
    max_output_tokens: int = 1
    # It pulls for the first time: until that is over another worker may do it.
    is_handed_over: bool = False
    num_lost: int = 0
    num_emitted: int = 0
    # It was started before.
    is_again: bool = False
    priority: int = 0

    @property
    def turn(self) -> tuple[int, int]:
        """Who is to start first among those that ask for the same."""
        return self.priority, self.seq

    def begin_again(self) -> None:
        self.is_started, self.lease, self.is_again = False, None, True

    def lose(self) -> None:
        """Its worker is dead, and so is all that it had."""
        self.leave()
        self.begin_again()
        self.num_aborts = 0
        self.num_lost += 1

    def leave(self) -> None:
        """No worker computes it now."""
        self.at, self.is_pulling, self.outstanding_tokens = None, False, 0
