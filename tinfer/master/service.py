"""The master as the API sees it: one object that takes requests and tells how things stand."""

from __future__ import annotations

import enum
import itertools
import secrets
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from tinfer.api.service import Generation, ModelCard, Stream
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Role
from tinfer.errors import InvalidRequest, NoWorker
from tinfer.master.holdings import holdings
from tinfer.master.lag import BOUNDS_S, LagMeter
from tinfer.master.loop import Dispatcher
from tinfer.master.metrics.collector import Sources, registry_of
from tinfer.master.rolling import Rolling
from tinfer.master.supervisor import Life, Supervisor
from tinfer.master.tracing.chrome import trace_events
from tinfer.wire.links import Incarnation

# Of each kind; `/debug/state` is for a person.
NUM_WAITING_SHOWN = 100


class Mood(enum.Enum):
    """What the server does with new requests."""

    STARTING = "starting"
    SERVING = "ok"
    DRAINING = "draining"


class MasterService:
    """Implements `api.service.Service`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        scheduler: Scheduler,
        supervisor: Supervisor,
        rolling: Rolling,
        model: ModelCard,
        lag: LagMeter,
        run_name: str,
    ) -> None:
        self._dispatcher = dispatcher
        self._scheduler = scheduler
        self._supervisor = supervisor
        self.drain, self.restart = rolling.drain, rolling.restart
        self._model = model
        self._lag = lag
        self._run_name = run_name
        # Wall time less the clock of the dispatcher, in microseconds, once a trace was asked for.
        self._epoch_us: int | None = None
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count()
        self.mood = Mood.STARTING
        self.registry = registry_of(
            Sources(
                dispatcher,
                scheduler,
                supervisor,
                lag,
                model.names[0],
                model.max_model_len,
                lambda: self.healthy()[0],
            )
        )

    @property
    def model(self) -> ModelCard:
        return self._model

    def lower_max_model_len(self, max_model_len: int) -> None:
        """A worker has come up anew and takes no longer requests: from now on nobody's may be."""
        least = min(self._model.max_model_len, max_model_len)
        self._model = msgspec.structs.replace(self._model, max_model_len=least)

    def submit(self, generation: Generation) -> Stream:
        if self.mood is not Mood.SERVING:
            self._dispatcher.tally.refuse(self.mood.value)
            raise NoWorker(f"the server is {self.mood.value}")
        request_id = f"{self._prefix}-{next(self._numbers)}"
        return self._dispatcher.submit(request_id, generation)

    def healthy(self) -> tuple[bool, str]:
        if self.mood is not Mood.SERVING:
            return False, self.mood.value
        alive = any(slot.life is Life.READY for slot in self._supervisor.slots.values())
        return (True, "ok") if alive else (False, "no worker is up")

    def ledger(self) -> dict[str, Any]:
        """All counts are zero when idle, but for `mapped_peers`: mappings are made once and kept
        as long as both sides live; a mapping of a dead peer counts in `stale_mappings`. `holds`
        are levels of the processes, which are never zero."""
        stats = self._dispatcher.stats
        snapshot = self._scheduler.ledger_snapshot()
        body: dict[str, Any] = msgspec.to_builtins(snapshot)
        body["used_blocks"] = {
            who.worker_id: stat.num_used_blocks for who, stat in sorted(stats.items())
        }
        body["stale_mappings"] = sum(stat.num_stale_mappings for stat in stats.values())
        body["mapped_peers"] = sum(stat.num_mapped_peers for stat in stats.values())
        body["idle"] = (
            snapshot.is_zero
            and not any(body["used_blocks"].values())
            and body["stale_mappings"] == 0
        )
        pids = {worker_id: slot.pid for worker_id, slot in self._supervisor.slots.items()}
        body["holds"] = holdings(pids, self._run_name)
        return body

    def trace(self, seconds: float, request_id: str | None) -> Iterator[list[dict[str, Any]]]:
        lately = self._dispatcher.lately(seconds, request_id)
        if self._epoch_us is None:
            self._epoch_us = round((time.time() - lately.now_s) * 1e6)
        return trace_events(lately, self._epoch_us)

    def ask_role(self, worker_id: str, role: Role) -> None:
        slot = self._supervisor.slots.get(worker_id)
        if slot is None:
            known = ", ".join(sorted(self._supervisor.slots))
            message = f"there is no worker {worker_id!r}; there are: {known}"
            raise InvalidRequest(message, param="worker")
        self._dispatcher.ask_role(Incarnation(worker_id, slot.generation), role)

    def _request_log(self) -> dict[str, int] | None:
        """Its lines; null where there is none."""
        request_log = self._dispatcher.request_log
        if request_log is None:
            return None
        return {"num_written": request_log.num_written, "num_lost": request_log.num_lost}

    def state(self) -> dict[str, Any]:
        views = {view.worker_id: view for view in self._scheduler.workers_snapshot()}
        workers = []
        for worker_id, slot in self._supervisor.slots.items():
            view = views.get(worker_id)
            stats = self._dispatcher.stats.get(Incarnation(worker_id, slot.generation))
            workers.append(
                {
                    "id": worker_id,
                    "role": self._dispatcher.changed_roles.get(
                        worker_id, slot.placement.role
                    ).value,
                    "device": slot.placement.label,
                    "state": "draining" if slot.is_leaving else slot.life.value,
                    "generation": slot.generation,
                    "pid": slot.pid,
                    "restarts": slot.num_restarts,
                    "reason": slot.reason,
                    "transport": slot.ready.transport if slot.ready else None,
                    "num_blocks": slot.ready.num_blocks if slot.ready else None,
                    "scheduled": msgspec.to_builtins(view) if view else None,
                    "engine": msgspec.structs.asdict(stats) if stats else None,
                }
            )
        return {
            "status": self.healthy()[1],
            "scheduler": msgspec.to_builtins(self._scheduler.config),
            "workers": workers,
            "waiting": msgspec.to_builtins(self._dispatcher.waiting(NUM_WAITING_SHOWN)),
            "requests_by_phase": self._scheduler.ledger_snapshot().requests_by_phase,
            "num_finished": self._dispatcher.num_finished,
            "num_restarts": self._dispatcher.num_restarts,
            "request_log": self._request_log(),
            "loop_lag": {"bounds_s": BOUNDS_S, "counts": self._lag.counts},
        }
