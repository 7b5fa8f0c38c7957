"""Keeps the workers alive: starts them, sees them die, starts them again under a new generation.

A death is seen on a pidfd, at once and for certain; the exit status follows from the zygote. What a
death means for requests is the scheduler's matter; this module only says who is up and who is down.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tinfer.config import ServeConfig
from tinfer.errors import WorkerCannotStart
from tinfer.master.placement import Placement, worker_spec
from tinfer.master.rundir import RunDirectory
from tinfer.master.zygote_link import Lifeline, ZygoteLink
from tinfer.wire.control import CannotFork, Control, Exited, Fork, Forked, Imported
from tinfer.wire.links import Incarnation
from tinfer.wire.messages import Ready

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 30.0
# A worker that has served this long starts its next life with a clean record.
STABLE_AFTER_S = 60.0
# How long workers get to leave after `Stop` before they are killed.
STOP_GRACE_S = 5.0


class Life(enum.Enum):
    """Where an incarnation is."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"
    GIVEN_UP = "given-up"
    STOPPED = "stopped"


Leaves = Literal["drain", "restart"]
# What ended an incarnation that was not asked to leave. `signal` and `exit`: its process ended,
# killed from outside or by itself; `fault`: its own word; `hung` and `nonsense`: the master killed
# it for that; `start`: it was not ready in time; `unknown`: the exit status had not come.
Cause = Literal["signal", "exit", "fault", "hung", "nonsense", "start", "unknown"]


class WorkerSlot:
    """One worker over all its incarnations."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.generation = 0
        self.life = Life.DEAD
        self.pid: int | None = None
        self.ready: Ready | None = None
        self.ready_at_s = 0.0
        self.num_failures = 0
        self.num_restarts = 0
        self.reason = ""
        self.cause: Cause = "unknown"
        self.has_said_why = False  # the reason is the worker's own word, not just how it ended
        # Someone wants it stopped, once it is empty, and then started again or not.
        self.leaves: Leaves | None = None
        self.pidfd = -1
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_leaving(self) -> bool:
        """Whether it is up, and to be stopped."""
        return self.life is Life.READY and self.leaves is not None

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(self.placement.worker_id, self.generation)


class Supervisor:
    """Owns the zygote and every worker process.

    `on_up(slot)` and `on_down(incarnation)` come in pairs for incarnations that became ready;
    `on_given_up(slot)` when a worker will not be tried again; `on_change()` after anything.
    """

    def __init__(
        self,
        config: ServeConfig,
        placements: list[Placement],
        run_dir: RunDirectory,
        model_dir: str,
        on_up: Callable[[WorkerSlot], None],
        on_down: Callable[[Incarnation], None],
        on_given_up: Callable[[WorkerSlot], None],
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._model_dir = model_dir
        self._on_up = on_up
        self._on_down = on_down
        self._on_given_up = on_given_up
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._lifeline = Lifeline()
        self._zygote: ZygoteLink | None = None
        self._transport = ""
        self._num_zygote_failures = 0
        self._zygote_timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._all_gone = asyncio.Event()
        self.import_s: float | None = None
        self.notes: set[str] = set()
        self.slots = {p.worker_id: WorkerSlot(p) for p in placements}
        # By worker and cause, since the start.
        self.deaths: Counter[tuple[str, Cause]] = Counter()

    # --- starting -----------------------------------------------------------------------------

    def start_imports(self) -> None:
        """Start the zygote, whose imports take longest."""
        self._start_zygote()

    def start_workers(self, transport: str) -> None:
        """Order every worker; readiness arrives through the callbacks."""
        self._transport = transport
        for slot in self.slots.values():
            if slot.life is not Life.GIVEN_UP:
                self._start(slot)

    def _start_zygote(self) -> None:
        self._zygote = ZygoteLink(
            self._config, self._run_dir.path, self._lifeline, self._control, self._zygote_gone
        )

    def _start(self, slot: WorkerSlot) -> None:
        if self._stopping:
            return
        slot.generation += 1
        slot.life = Life.STARTING
        slot.reason, slot.has_said_why, slot.cause = "", False, "unknown"
        slot.pid = None
        spec = worker_spec(
            self._config,
            slot.placement,
            slot.generation,
            self._model_dir,
            self._run_dir.socket_path,
            self._run_dir.log_path(slot.placement.worker_id, self._config.log_dir),
            self._transport,
        )
        if self._zygote is not None:  # else the next one gets the order
            self._zygote.fork(spec)
        self._set_timer(slot, self._config.start_timeout, self._start_too_slow)
        self._on_change()

    def _start_too_slow(self, slot: WorkerSlot) -> None:
        slot.reason, slot.cause = f"not ready after {self._config.start_timeout:g} s", "start"
        if slot.pidfd >= 0:
            self._kill(slot)
        else:
            # The import process has not come to it. If it has done so before it hangs, and then no
            # order would ever be carried out: it is replaced, and no worker is hurt by that.
            if self._zygote is not None and self.import_s is not None:
                self._zygote.kill()
            self._died(slot)

    def _set_timer(
        self, slot: WorkerSlot, delay_s: float, call: Callable[[WorkerSlot], None]
    ) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        slot.timer = self._loop.call_later(delay_s, call, slot)

    # --- what the zygote says -----------------------------------------------------------------

    def _control(self, message: Control) -> None:
        match message:
            case Imported(seconds):
                self.import_s = seconds
                self._num_zygote_failures = 0
            case Forked(worker_id, generation, pid, forked, note):
                if not forked:
                    self.notes.add(f"workers are spawned, not forked: {note}")
                self._forked(self.slots[worker_id], generation, pid)
            case CannotFork(worker_id, generation, reason):
                self._not_forked(self.slots[worker_id], generation, reason)
            case Exited(pid, status):
                self._explain(pid, status)
            case Fork():
                log.error("the import process sent an order")
        self._on_change()

    def _forked(self, slot: WorkerSlot, generation: int, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            pidfd = -1
        # `Ready` comes by another way and may have been first.
        wanted = slot.life in (Life.STARTING, Life.READY)
        if generation != slot.generation or not wanted:
            if pidfd >= 0:  # it was given up while its order waited
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            return
        slot.pid, slot.pidfd = pid, pidfd
        if pidfd < 0:
            self._died(slot)
            return
        self._loop.add_reader(slot.pidfd, self._died, slot)

    def _not_forked(self, slot: WorkerSlot, generation: int, reason: str) -> None:
        if generation == slot.generation and slot.life is Life.STARTING:
            slot.reason, slot.has_said_why = reason, True
            self._give_up(slot)

    def _explain(self, pid: int, status: int) -> None:
        for slot in self.slots.values():
            if slot.pid == pid and not slot.reason:
                slot.reason = _exit_reason(status)
                slot.cause = "signal" if status < 0 else "exit"

    def _zygote_gone(self) -> None:
        """Workers are unharmed: the master becomes their parent (it is a subreaper). A zygote that
        cannot even do its first imports is not tried again."""
        if self._stopping or self._zygote is None:
            return
        reason = f"the import process ended: {_exit_reason(self._zygote.reap())}"
        log.warning("%s", reason)
        if self.import_s is None and (last := self._zygote.last_line()):
            reason = f"{reason}; {last}"
        self._zygote = None
        if self.import_s is None:
            for slot in self.slots.values():
                slot.reason = reason
                self._give_up(slot)
            return
        self._num_zygote_failures += 1
        delay_s = _backoff_s(self._num_zygote_failures)
        self._zygote_timer = self._loop.call_later(delay_s, self._restart_zygote)

    def _restart_zygote(self) -> None:
        self._start_zygote()
        for slot in self.slots.values():
            if slot.life is Life.STARTING and slot.pid is None:
                self._start(slot)  # its order was lost

    # --- what the workers say -----------------------------------------------------------------

    def worker_ready(self, sender: Incarnation, ready: Ready) -> bool:
        """False for an incarnation that is no longer wanted."""
        slot = self.slots.get(sender.worker_id)
        if slot is None or slot.incarnation != sender or slot.life is not Life.STARTING:
            return False
        if slot.timer is not None:
            slot.timer.cancel()
        slot.life = Life.READY
        slot.ready = ready
        slot.ready_at_s = self._loop.time()
        slot.reason = ""
        self._on_up(slot)
        self._on_change()
        return True

    def worker_failed(self, sender: Incarnation, reason: str) -> None:
        """`CannotStart` or `Fault`; the exit that ends the incarnation follows."""
        slot = self.slots.get(sender.worker_id)
        if slot is not None and slot.incarnation == sender:
            slot.reason, slot.has_said_why, slot.cause = reason, True, "fault"

    def end_worker(self, slot: WorkerSlot, reason: str, cause: Cause) -> None:
        """Kill a worker that lives and can not be used; its death follows."""
        if slot.life is Life.READY and not slot.has_said_why:
            slot.reason, slot.has_said_why, slot.cause = reason, True, cause
            self._kill(slot)

    # --- deaths -------------------------------------------------------------------------------

    def _died(self, slot: WorkerSlot) -> None:
        if slot.pidfd >= 0:
            self._loop.remove_reader(slot.pidfd)
            os.close(slot.pidfd)
            slot.pidfd = -1
        if slot.timer is not None:
            slot.timer.cancel()
        was_ready, slot.life = slot.life is Life.READY, Life.DEAD
        if slot.leaves or (was_ready and self._loop.time() - slot.ready_at_s > STABLE_AFTER_S):
            slot.num_failures = 0
        slot.num_failures += slot.leaves is None
        self._reap_orphan(slot)
        if was_ready:
            self._on_down(slot.incarnation)
        if self._stopping:
            self._check_all_gone()
            return
        # The exit status comes from the zygote, often a moment after the pidfd.
        self._loop.call_later(0.05, self._after_death, slot, slot.generation)

    def _after_death(self, slot: WorkerSlot, generation: int) -> None:
        if self._stopping or slot.generation != generation or slot.life is not Life.DEAD:
            return
        if slot.leaves is not None:
            return self._left(slot)
        self.deaths[slot.placement.worker_id, slot.cause] += 1
        never_served = slot.num_restarts == 0 and slot.ready is None
        # A worker that never served ends the start, and its reason is what the user is told then.
        level = logging.INFO if never_served else logging.ERROR
        reason = slot.reason or "no reason known"
        log.log(level, "worker %s died: %s", slot.placement.worker_id, reason)
        if never_served or slot.num_failures > self._config.max_worker_restarts:
            self._give_up(slot)
        else:
            slot.num_restarts += 1
            self._set_timer(slot, _backoff_s(slot.num_failures), self._start)
            self._on_change()

    # --- leaving on request -------------------------------------------------------------------

    def retire(self, slot: WorkerSlot, ask: Callable[[Incarnation], None]) -> None:
        """End a worker that was told to leave: `ask` it to, and kill it if it does not."""
        if slot.life is Life.READY:
            ask(slot.incarnation)
            self._set_timer(slot, STOP_GRACE_S, self._kill)

    def rest(self, slot: WorkerSlot) -> None:
        """A worker that is down and would come back stays away until `start_again`."""
        if slot.timer is not None:
            slot.timer.cancel()
        slot.life, slot.leaves = Life.STOPPED, None
        slot.pid, slot.reason = None, ""
        self._on_change()

    def start_again(self, slot: WorkerSlot) -> None:
        """Start a worker that is down, at once and with a clean record."""
        slot.num_failures, slot.leaves = 0, None
        slot.num_restarts += 1
        self._start(slot)

    def _left(self, slot: WorkerSlot) -> None:
        log.info("worker %s has ended on request", slot.placement.worker_id)
        self.rest(slot) if slot.leaves == "drain" else self.start_again(slot)

    def _give_up(self, slot: WorkerSlot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        slot.life = Life.GIVEN_UP
        self._on_given_up(slot)
        self._on_change()

    def _reap_orphan(self, slot: WorkerSlot) -> None:
        """Reap a worker that outlived its zygote and so became this process's child."""
        if slot.pid is None:
            return
        try:
            pid, status = os.waitpid(slot.pid, os.WNOHANG)
        except ChildProcessError:
            return  # the zygote's child, as usual
        if pid:
            self._explain(pid, os.waitstatus_to_exitcode(status))

    def _kill(self, slot: WorkerSlot) -> None:
        if slot.pidfd >= 0:
            signal.pidfd_send_signal(slot.pidfd, signal.SIGKILL)

    # --- stopping -----------------------------------------------------------------------------

    async def stop(self, ask: Callable[[Incarnation], None]) -> None:
        """End all processes: `ask` each ready worker to leave, kill what stays, then the zygote,
        which removes the run directory. Idempotent enough to be called after a failed start."""
        self._stopping = True
        if self._zygote_timer is not None:
            self._zygote_timer.cancel()
        for slot in self.slots.values():
            if slot.timer is not None:
                slot.timer.cancel()
            if slot.life is Life.READY:
                ask(slot.incarnation)
            else:
                self._kill(slot)
        self._check_all_gone()
        try:
            await asyncio.wait_for(self._all_gone.wait(), STOP_GRACE_S)
        except TimeoutError:
            self.kill_all()
        self._lifeline.close()
        if self._zygote is not None:
            await self._zygote.close(STOP_GRACE_S)

    def kill_all(self) -> None:
        """SIGKILL every worker that still lives."""
        for slot in self.slots.values():
            self._kill(slot)

    def _check_all_gone(self) -> None:
        if all(slot.pidfd < 0 for slot in self.slots.values()):
            self._all_gone.set()

    def log_tail(self, slot: WorkerSlot, num_lines: int = 15) -> str:
        """The end of a worker's log, to show why it could not start."""
        path = Path(self._run_dir.log_path(slot.placement.worker_id, self._config.log_dir))
        try:
            return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])
        except OSError:
            return ""

    def cannot_start(self, slot: WorkerSlot) -> WorkerCannotStart:
        return WorkerCannotStart(
            f"worker {slot.placement.worker_id} ({slot.placement.label}) cannot start: "
            f"{slot.reason or 'it died without a word'}"
        )


def _backoff_s(num_failures: int) -> float:
    """How long to wait after that many failures in a row."""
    return float(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (num_failures - 1)))


def _exit_reason(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
