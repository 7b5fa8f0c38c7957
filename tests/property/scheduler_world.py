"""A box in which anything may happen, and the books that say what must hold after each event.

The books are kept from nothing but the events delivered and the actions that came back. A second
scheduler, told of the same workers in another order, must act alike; at the end all work is let
through, every account must be zero, and the event log must replay to the same actions.
"""

from __future__ import annotations

import random

import msgspec

from tests.property.scheduler_model import Book, Incarnation, Process, Row
from tests.unit.core_box import PLAIN
from tinfer.core.events import (
    AbortOn,
    Action,
    Arrived,
    Cancelled,
    DrainAsked,
    Drained,
    Event,
    ExtendLease,
    Fail,
    FirstToken,
    LeaseEnded,
    LeaseOpened,
    LeaseOverdue,
    Prefilled,
    Pulled,
    ReleaseLease,
    Remainder,
    Resume,
    RoleAsked,
    RoleChanged,
    RoleRefused,
    StartDecode,
    StartPrefill,
    StartReprefill,
    StartWhole,
    Tick,
    WorkerDown,
    WorkerExpected,
    WorkerFinished,
    WorkerGone,
    WorkerUp,
)
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Capacity, LeaseKey, Phase, Role, Route, SchedulerConfig

CAPACITY = Capacity(num_blocks=6, block_tokens=4, max_num_seqs=2, chunk_tokens=4)
# The books below say what these policies do; what others do is tested with the policies.
CONFIG = SchedulerConfig(max_num_queued_reqs=4, **PLAIN)
ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "B": Role.BOTH}


class World:
    """A box of workers, its scheduler, and the books that check it after every event."""

    def __init__(self, fleet: str, order: random.Random, config: SchedulerConfig = CONFIG) -> None:
        self.config = config
        self.scheduler, self.twin = Scheduler(config), Scheduler(config)
        self.log: list[tuple[Event, list[Action]]] = []
        self.rows: dict[LeaseKey, Row] = {}
        self.books: dict[str, Book] = {}
        # Prefills of what was lost, for the requests in `books`.
        self.again: dict[str, Book] = {}
        self.held: dict[LeaseKey, int] = {}
        self.released: set[LeaseKey] = set()
        self.read: set[LeaseKey] = set()
        self.up: dict[str, int] = {}
        self.gone: set[str] = set()
        self.draining: set[Incarnation] = set()
        self.drained: set[Incarnation] = set()
        self.processes: list[Process] = []
        ups: list[Event] = []
        for i, letter in enumerate(fleet):
            self.processes.append(Process(f"w{i}", 0, ROLES[letter], self.rows))
            ups.append(WorkerUp(f"w{i}", 0, ROLES[letter], CAPACITY))
            self.up[f"w{i}"] = 0
        for event in ups:
            self.log.append((event, self.scheduler.on_event(event, 0.0)))
        order.shuffle(ups)
        for event in ups:
            self.twin.on_event(event, 0.0)

    # --- what can happen -----------------------------------------------------------------

    def arrive(
        self,
        prompt_tokens: int,
        max_output_tokens: int,
        route: Route | None,
        block_hashes: tuple[int, ...] = (),
    ) -> None:
        rid = f"r{len(self.books)}"
        wish = Route.WHOLE if max_output_tokens == 1 else route or Route.SPLIT
        priority = -(prompt_tokens % 2)  # some go before the others
        self.books[rid] = Book(
            len(self.books),
            wish,
            prompt_tokens=prompt_tokens,
            max_output_tokens=max_output_tokens,
            priority=priority,
        )
        size = (prompt_tokens, max_output_tokens)
        self.feed(Arrived(rid, *size, route, block_hashes=block_hashes, priority=priority))

    def cancel(self, index: int) -> None:
        """One of the latest requests, whatever it is at."""
        if not self.books:
            return
        self.feed(Cancelled(f"r{len(self.books) - 1 - index % min(6, len(self.books))}"))

    def work(self, kind: str, index: int, choice: int) -> None:
        """A worker receives, steps or is heard; `index` says which one, `choice` how it goes."""
        if kind == "receive":
            self.receive(index, choice)
        elif kind == "step":
            self.step(index, choice)
        else:
            self.deliver(index, twice=choice == 1)

    def receive(self, index: int, choice: int) -> None:
        if busy := [p for p in self.processes if p.inbox]:
            busy[index % len(busy)].receive(choice)

    def step(self, index: int, choice: int) -> None:
        if steps := [step for p in self.processes if p.is_alive for step in p.steps()]:
            steps[index % len(steps)](choice)

    def deliver(self, index: int, twice: bool) -> None:
        busy = [p for p in self.processes if p.outbox]
        if not busy:
            return
        event = busy[index % len(busy)].outbox.popleft()
        self.feed(event)
        # An abort that crosses an end, a lease asked about again: some facts do come twice.
        if twice and isinstance(event, FirstToken | WorkerFinished | LeaseOverdue | Pulled):
            self.feed(event)

    def disturb(self, index: int, kind: str) -> None:
        """Workers die, are seen dead, come back or do not; the rest finds them so."""
        alive = [p for p in self.processes if p.is_alive]
        dead = [p for p in self.processes if not p.is_alive]
        down = self.down()
        if kind == "kill" and alive:
            alive[index % len(alive)].die()
        elif kind == "notice" and dead:
            # Mostly the latest death, at times one that was noticed long ago.
            process = dead[-1 - index % 3 % len(dead)]
            self.notice(process, index)
        elif kind == "restart" and down:
            self.restart(down[index % len(down)])
        elif kind == "give up" and dead and dead[index % len(dead)].id not in self.gone:
            self.gone.add(dead[index % len(dead)].id)
            self.feed(WorkerGone(dead[index % len(dead)].id))
        elif kind == "expect" and self.gone:
            worker_id = sorted(self.gone)[index % len(self.gone)]
            self.gone.discard(worker_id)
            role = next(p.role for p in self.processes if p.id == worker_id)
            self.feed(WorkerExpected(worker_id, role))
        else:
            self.feed(Tick())

    def notice(self, dead: Process, index: int) -> None:
        """The scheduler hears of a death, and what is left of some of what that worker had."""
        left = [
            Remainder(rid, book.prompt_tokens + 1, book.max_output_tokens - 1, book.num_emitted + 2)
            for rid, book in self.books.items()
            if book.is_open and book.max_output_tokens > 2 and self.is_at(rid, *self.name_of(dead))
            if (index + book.seq) % 2
        ]
        self.feed(WorkerDown(*self.name_of(dead), tuple(left)))

    def name_of(self, process: Process) -> Incarnation:
        return process.id, process.generation

    def restart(self, last: Process) -> None:
        process = Process(last.id, last.generation + 1, last.role, self.rows)
        self.processes.append(process)
        for generation in (last.generation, process.generation):  # the first one is late
            self.feed(WorkerUp(last.id, generation, last.role, CAPACITY))

    def report(self, index: int, num_steps: int) -> None:
        """A live worker says how far it is: some steps more, and a chunk of one of its prompts."""
        alive = [p for p in self.processes if p.is_alive and self.is_up(p.id, p.generation)]
        if not alive:
            return
        process = alive[index % len(alive)]
        process.report(
            num_steps, tuple((rid, 1 + index % 20) for rid in sorted(process.prefills)[:1])
        )

    def ask_role(self, index: int, role: Role) -> None:
        """A person wants a worker in that role, whether it is up or not."""
        process = self.processes[index % len(self.processes)]
        self.feed(RoleAsked(process.id, process.generation, role))

    def drain(self, index: int) -> None:
        """A person wants a worker out of service; one that has drained is stopped."""
        process = self.processes[index % len(self.processes)]
        if self.is_up(process.id, process.generation):
            self.draining.add(self.name_of(process))
        self.feed(DrainAsked(*self.name_of(process)))

    def down(self) -> list[Process]:
        """The last incarnation of every worker that was seen dead and may come back."""
        last = {p.id: p for p in self.processes}
        return [p for p in last.values() if p.id not in self.up and p.id not in self.gone]

    # --- the machine's own books ---------------------------------------------------------

    def feed(self, event: Event) -> None:
        now_s = float(len(self.log))
        self.note_event(event)
        actions = self.scheduler.on_event(event, now_s)
        assert self.twin.on_event(event, now_s) == actions
        self.log.append((event, actions))
        for action in actions:
            self.note_action(action)
        for action in actions:
            self.send(action)
        self.check_accounts()

    def note_event(self, event: Event) -> None:
        match event:
            case Cancelled(rid):
                self.books[rid].is_open = False
            case WorkerUp(worker_id, generation):
                if worker_id not in self.up and generation > self.last_generation(worker_id):
                    self.up[worker_id] = generation
            case WorkerDown(worker_id, generation) if self.up.get(worker_id) == generation:
                self.note_death(event)
            case LeaseEnded(key) if self.is_up(key.worker_id, key.worker_generation):
                del self.held[key]
                for book in self.waiting_for(key):  # offered again, and gone all the same
                    book.begin_again()
            case LeaseOpened(key, num_blocks) if self.is_up(key.worker_id, key.worker_generation):
                self.held[key] = num_blocks
            case Prefilled(rid, worker_id, generation, key, num_blocks):
                if self.is_up(worker_id, generation):
                    self.held[key] = num_blocks
                    self.book(rid).leave()
                    self.book(rid).lease = key
            case FirstToken(rid, worker_id, generation) if self.is_at(rid, worker_id, generation):
                self.books[rid].outstanding_tokens = 0
            case Pulled(rid, worker_id, generation) if self.is_up(worker_id, generation):
                self.note_pulled(self.books[rid])
            case WorkerFinished(rid, worker_id, generation):
                if self.is_at(rid, worker_id, generation):
                    self.book(rid).leave()
                    self.book(rid).is_open = False

    def note_death(self, event: WorkerDown) -> None:
        worker_id, generation = event.worker_id, event.generation
        left = {one.request_id: one for one in event.remainders}
        stricken = [b for b in self.books.values() if b.is_open and b.at == (worker_id, generation)]
        waiting = [
            b for key in self.held if key.worker_id == worker_id for b in self.waiting_for(key)
        ]
        del self.up[worker_id]
        for key in [key for key in self.held if key.worker_id == worker_id]:
            del self.held[key]
        for book in stricken:
            if book.is_pulling and book.is_handed_over and book.lease in self.held:
                book.leave()  # what it read is still there
            else:
                book.lose()
        for book in waiting:
            book.lose()
        for rid, one in left.items():
            book = self.books[rid]
            book.prompt_tokens, book.max_output_tokens = one.prompt_tokens, one.max_output_tokens
            book.num_emitted, book.num_lost = one.num_emitted, 0

    def waiting_for(self, key: LeaseKey) -> list[Book]:
        """The open request that waits for a reader of that lease."""
        return [
            b
            for b in self.books.values()
            if b.is_open and b.is_started and b.at is None and b.lease == key
        ]

    def note_pulled(self, book: Book) -> None:
        assert book.lease is not None
        book.is_pulling = False
        self.read.add(book.lease)

    def last_generation(self, worker_id: str) -> int:
        ups = [
            e.generation
            for e, _ in self.log
            if isinstance(e, WorkerUp | WorkerDown) and e.worker_id == worker_id
        ]
        return max(ups, default=-1)

    def note_action(self, action: Action) -> None:
        match action:
            case Fail(rid, cause):
                assert cause != "queue-full" or self.num_queued() > self.config.max_num_queued_reqs
                assert self.books[rid].is_open, f"{rid} ended twice"
                if cause == "worker-lost":
                    assert self.books[rid].num_lost > self.config.max_request_restarts
                self.books[rid].is_open = False
            case StartPrefill(rid, worker_id, generation) | StartWhole(rid, worker_id, generation):
                self.note_start(rid, (worker_id, generation))
            case StartDecode(rid, worker_id, generation, key):
                book = self.books[rid]
                assert book.is_open and book.is_started and book.at is None
                assert key in self.held and key not in self.released
                assert key.worker_id != worker_id and (worker_id, generation) not in self.draining
                book.at, book.is_pulling = (worker_id, generation), True
                book.is_handed_over = True
            case StartReprefill(prefill_id, rid, worker_id, generation):
                book = self.books[rid]
                assert book.is_open and book.at not in (None, (worker_id, generation))
                assert (worker_id, generation) not in self.draining
                self.again[prefill_id] = Book(
                    book.seq,
                    book.wish,
                    (worker_id, generation),
                    False,
                    True,
                    outstanding_tokens=999,
                )
            case Resume(rid, worker_id, generation, key):
                book = self.book(rid)
                assert book.at == (worker_id, generation) and not book.is_pulling
                if key is not None:
                    assert key in self.held and key not in self.released
                    assert key.worker_id != worker_id
                    book.lease, book.is_pulling = key, True
                    book.is_handed_over = False
            case Drained(worker_id, generation):
                self.note_drained((worker_id, generation))
            case AbortOn(rid, worker_id, generation):
                book = self.book(rid)
                assert book.at == (worker_id, generation) and not book.num_aborts
                book.num_aborts += 1
            case ReleaseLease(key):
                assert key in self.held and key not in self.released
                readers = [p for p in self.processes if p.reads(key)]
                assert not readers, f"{key} released under {readers[0].id}"
                self.released.add(key)
                for book in self.waiting_for(key):  # nobody is left who could read it
                    book.begin_again()
            case ExtendLease(key):
                assert key in self.held and key not in self.released | self.read

    def note_drained(self, worker: Incarnation) -> None:
        """Asked for, said once, and true: nothing is there, and nobody is to read from it."""
        assert worker in self.draining - self.drained, f"{worker} was not to drain, or has"
        self.drained.add(worker)
        assert not any(book.at == worker for book in (*self.books.values(), *self.again.values()))
        assert not any((key.worker_id, key.worker_generation) == worker for key in self.held)

    def stop(self, worker_id: str, generation: int) -> None:
        """The process of a worker that has drained ends, which is seen later."""
        for process in self.processes:
            if (process.id, process.generation) == (worker_id, generation) and process.is_alive:
                process.die()

    def note_start(self, rid: str, at: Incarnation) -> None:
        book = self.books[rid]
        assert at not in self.draining, f"{rid} started on {at}, which drains"
        assert book.is_open and not book.is_started
        if self.is_plain and not book.is_again:
            ahead = [b for b in self.books.values() if b.is_open and b.turn < book.turn]
            behind = [b for b in ahead if b.wish is book.wish and not b.is_started]
            behind = [b for b in behind if not b.is_again]
            assert not behind, f"{rid} jumped the queue"
        book.is_started, book.at = True, at
        book.outstanding_tokens = book.prompt_tokens

    def send(self, action: Action) -> None:
        """Every target is live by what the scheduler was told; a dead process loses its mail."""
        match action:
            case Fail() | RoleChanged() | RoleRefused():
                return
            case Drained(worker_id, generation):
                return self.stop(worker_id, generation)
            case ReleaseLease(key) | ExtendLease(key):
                target = (key.worker_id, key.worker_generation)
            case _:
                target = (action.worker_id, action.generation)
        assert self.is_up(*target), f"{action} goes to a dead incarnation"
        for process in self.processes:
            if (process.id, process.generation) == target and process.is_alive:
                process.inbox.append(action)

    def is_up(self, worker_id: str, generation: int) -> bool:
        return self.up.get(worker_id) == generation

    def is_at(self, rid: str, worker_id: str, generation: int) -> bool:
        at = (worker_id, generation)
        return self.is_up(*at) and self.book(rid).at == at

    def book(self, rid: str) -> Book:
        return self.again[rid] if rid in self.again else self.books[rid]

    def num_queued(self) -> int:
        return sum(book.is_open and not book.is_started for book in self.books.values())

    # --- what must hold ------------------------------------------------------------------

    def check_accounts(self) -> None:
        snapshot = self.scheduler.ledger_snapshot()
        for rid, book in self.books.items():
            phase = self.scheduler.request_phase(rid)
            assert (phase is not None) == book.is_open
            assert not book.is_open or (phase is Phase.QUEUED) == (not book.is_started)
        books = [*self.books.values(), *self.again.values()]
        placed = [b for b in books if b.at is not None and self.is_up(*b.at)]
        assert snapshot.open_requests == sum(book.is_open for book in self.books.values())
        assert snapshot.pulls == sum(book.is_pulling for book in placed)
        fresh = [b for b in self.books.values() if not b.is_again]
        num_fresh = sum(book.is_open and not book.is_started for book in fresh)
        assert num_fresh <= self.config.max_num_queued_reqs
        assert snapshot.open_requests == sum(snapshot.requests_by_phase.values())
        assert snapshot.zombies == sum(not book.is_open for book in placed)
        assert snapshot.leases == len(self.held)
        for worker in self.scheduler.workers_snapshot():
            at = (worker.worker_id, worker.generation)
            num_held = sum(n for key, n in self.held.items() if key.worker_id == at[0])
            assert worker.num_held_blocks == snapshot.held_blocks[at[0]] == num_held
            assert worker.num_seqs == sum(book.at == at for book in placed)
            assert worker.num_seqs <= CAPACITY.max_num_seqs
            num_tokens = sum(book.outstanding_tokens for book in placed if book.at == at)
            assert 0 <= worker.outstanding_prefill_tokens <= num_tokens
            if self.is_plain:
                assert worker.outstanding_prefill_tokens == num_tokens
                assert num_tokens < 2 * CAPACITY.chunk_tokens + 30

    def finish(self) -> None:
        """Let all work end: nothing is left anywhere, and the log replays."""
        self.run_to_quiescence()
        assert not any(book.is_open for book in self.books.values())
        assert self.scheduler.ledger_snapshot().is_zero
        for worker in self.scheduler.workers_snapshot():
            counts = (worker.outstanding_prefill_tokens, worker.num_projected_blocks)
            assert counts == (0, 0)
        assert not self.rows
        self.replay()

    def run_to_quiescence(self) -> None:
        """Let every message through and all work end well; the dead come back, the gone do not."""
        for _ in range(1000):
            for process in self.processes:
                if not process.is_alive and self.is_up(process.id, process.generation):
                    self.notice(process, 0)
            for process in self.down():
                self.restart(process)
            if not self.run_once():
                return
        raise AssertionError("work goes on for ever")

    def run_once(self) -> bool:
        moved = False
        for process in self.processes:
            while process.inbox:
                process.receive(0)
                moved = True
            while process.outbox:
                self.feed(process.outbox.popleft())
                moved = True
            for step in process.steps() if process.is_alive else []:
                num_sent, num_rows = len(process.outbox), len(self.rows)
                num_copying = sum(pull.is_copying for pull in process.pulls.values())
                step(0)
                if process.outbox and isinstance(process.outbox[-1], LeaseOverdue):
                    self.feed(process.outbox.pop())
                changed = (len(process.outbox), len(self.rows)) != (num_sent, num_rows)
                copying = sum(pull.is_copying for pull in process.pulls.values())
                moved = moved or changed or copying != num_copying
        return moved

    def replay(self) -> None:
        decoder = msgspec.json.Decoder(Event)
        scheduler = Scheduler(self.config)
        for i, (event, actions) in enumerate(self.log):
            now_s = float(i) if i >= self.num_first_ups else 0.0
            assert scheduler.on_event(decoder.decode(msgspec.json.encode(event)), now_s) == actions

    @property
    def is_plain(self) -> bool:
        """Whether the books know what the policies decide, not only what no policy may."""
        return self.config is CONFIG

    @property
    def num_first_ups(self) -> int:
        return len({process.id for process in self.processes})
