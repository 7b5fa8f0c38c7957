"""Workers taken out of service on request, and back into it: no stream is lost by it.

A worker that is to leave takes nothing new, finishes what it has, waits until its blocks are read,
and is stopped. What it still has when its time is up goes on elsewhere, as after a death.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tinfer.core import events
from tinfer.errors import InvalidRequest
from tinfer.master.loop import Dispatcher
from tinfer.master.supervisor import Life, Supervisor, WorkerSlot
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation

log = logging.getLogger(__name__)


class Rolling:
    """Drains and restarts workers; all methods are called on the loop's thread."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        supervisor: Supervisor,
        send: Callable[[Incarnation, wire.ToWorker], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._supervisor = supervisor
        self._send = send
        self._timers: dict[str, asyncio.TimerHandle] = {}
        dispatcher.on_drained = self._retire

    def drain(self, worker_id: str, timeout_s: float) -> None:
        """Stop a worker within that time, for good until `restart`. Asked again, the new time
        counts. Raises `InvalidRequest` for one that is unknown or the last that serves."""
        slot = self._slot(worker_id)
        if slot.life is Life.STARTING:
            raise InvalidRequest(f"worker {worker_id} is starting", param="worker")
        if slot.life is Life.READY:
            others = (one for one in self._supervisor.slots.values() if one is not slot)
            if not any(one.life is Life.READY and one.leaves is None for one in others):
                message = f"worker {worker_id} is the last one that serves"
                raise InvalidRequest(message, param="worker")
        self._dispatcher.worker_event(events.WorkerGone(worker_id))
        if slot.life is Life.READY:
            slot.leaves = "drain"
            self._begin(slot, timeout_s)
        else:
            self._supervisor.rest(slot)

    def restart(self, worker_id: str, timeout_s: float) -> None:
        """Stop a worker within that time, if it is up, and start it anew. Raises `InvalidRequest`
        for one that is unknown or starting."""
        slot = self._slot(worker_id)
        if slot.life is Life.STARTING:
            raise InvalidRequest(f"worker {worker_id} is starting", param="worker")
        role = self._dispatcher.changed_roles.get(worker_id, slot.placement.role)
        self._dispatcher.worker_event(events.WorkerExpected(worker_id, role))
        if slot.life is Life.READY:
            slot.leaves = "restart"
            self._begin(slot, timeout_s)
        else:
            self._supervisor.start_again(slot)

    def close(self) -> None:
        """Nobody is retired any more: the whole server stops."""
        for timer in self._timers.values():
            timer.cancel()

    def _slot(self, worker_id: str) -> WorkerSlot:
        slot = self._supervisor.slots.get(worker_id)
        if slot is None:
            known = ", ".join(sorted(self._supervisor.slots))
            message = f"there is no worker {worker_id!r}; there are: {known}"
            raise InvalidRequest(message, param="worker")
        return slot

    def _begin(self, slot: WorkerSlot, timeout_s: float) -> None:
        worker = slot.incarnation
        self._cancel_timer(worker.worker_id)
        loop = asyncio.get_running_loop()
        self._timers[worker.worker_id] = loop.call_later(timeout_s, self._time_is_up, worker)
        self._dispatcher.worker_event(events.DrainAsked(*worker))

    def _time_is_up(self, worker: Incarnation) -> None:
        log.warning("worker %s has not drained in time: its requests move", worker.worker_id)
        self._retire(worker)

    def _retire(self, worker: Incarnation) -> None:
        self._cancel_timer(worker.worker_id)
        slot = self._supervisor.slots[worker.worker_id]
        if slot.incarnation == worker:  # else it has died, and so left, before
            self._supervisor.retire(slot, lambda one: self._send(one, wire.Stop()))

    def _cancel_timer(self, worker_id: str) -> None:
        timer = self._timers.pop(worker_id, None)
        if timer is not None:
            timer.cancel()
