"""The workers of a plan, running, for as long as they are measured."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import TracebackType

from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master import transport
from tinfer.master.plan import Decision
from tinfer.master.rundir import RunDirectory
from tinfer.master.supervisor import Life, Supervisor, WorkerSlot
from tinfer.tuner.driver import Moment, Received
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation, MasterLink


class Box:
    """An asynchronous context: the workers are up inside, and nothing is left of them outside.

    Implements `driver.Workers`. Raises `StartError` on entry if a worker cannot start. None is
    started again: a worker that dies ends the measurement.
    """

    def __init__(self, config: ServeConfig, decision: Decision) -> None:
        self.ready: dict[str, wire.Ready] = {}
        self.transport = ""
        self.is_closing = False
        self._config = config
        self._placements = decision.placements
        self._model_dir = decision.model.directory
        self._incarnations: dict[str, Incarnation] = {}
        self._received: asyncio.Queue[Received | StartError] = asyncio.Queue()
        self._all_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Box:
        self._run_dir = RunDirectory()
        self._supervisor = Supervisor(
            self._config,
            self._placements,
            self._run_dir,
            self._model_dir,
            self._up,
            self._down,
            self._given_up,
            lambda: None,
        )
        # First, so that there is who removes the directory whenever this process dies.
        self._supervisor.start_imports()
        self._run_dir.make()
        self._link = MasterLink(self._run_dir.socket_path, self._on_message)
        try:
            choice = await transport.choose(self._config, self._placements)
            self.transport = choice.name
            self._supervisor.start_workers(choice.name)
            await self._all_ready
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self._close()

    def hurry(self) -> None:
        """Kill the workers; the context ends as usual, and sooner."""
        self._supervisor.kill_all()

    # --- for who measures ---------------------------------------------------------------------

    def moment(self, worker_id: str) -> Moment:
        """Now, and the waits of the worker's main thread, which steps the engine, as the kernel
        counts them; 0 where it does not.

        Source: the second figure of /proc/PID/schedstat, nanoseconds.
        """
        at_s = time.monotonic()
        try:
            figures = Path(f"/proc/{self.ready[worker_id].pid}/schedstat").read_text().split()
            return Moment(at_s, int(figures[1]) / 1e9)
        except (OSError, ValueError, IndexError):
            return Moment(at_s, 0.0)

    def send(self, worker_id: str, message: wire.ToWorker) -> None:
        """Hand a message to a worker; never blocks."""
        self._link.send(self._incarnations[worker_id], message)

    async def receive(self) -> Received:
        """The next message of any worker. Raises `StartError` where one has died, or where none
        says anything for as long as a start may take."""
        try:
            async with asyncio.timeout(self._config.start_timeout):
                received = await self._received.get()
        except TimeoutError as error:
            raise StartError(
                f"no worker said anything for {self._config.start_timeout:g} s (--start-timeout)"
            ) from error
        if isinstance(received, StartError):
            raise received
        return received

    # --- what the workers do ------------------------------------------------------------------

    def _on_message(self, sender: Incarnation, message: wire.ToMaster) -> None:
        match message:
            case wire.Ready():
                if not self._supervisor.worker_ready(sender, message):
                    self._link.send(sender, wire.Stop())
            case wire.CannotStart(reason) | wire.Fault(reason):
                self._supervisor.worker_failed(sender, reason)
            case _ if sender.worker_id in self.ready:
                moment = self.moment(sender.worker_id)
                self._received.put_nowait(Received(moment, sender.worker_id, message))

    def _up(self, slot: WorkerSlot) -> None:
        self._incarnations[slot.placement.worker_id] = slot.incarnation
        slots = self._supervisor.slots.values()
        if any(one.life is not Life.READY for one in slots):
            return
        # In the order of the plan: the first is the one that is measured.
        self.ready = {s.placement.worker_id: s.ready for s in slots if s.ready is not None}
        for reader in slots:
            for owner in slots:
                if owner is not reader and owner.ready is not None:
                    up = wire.PeerUp(*owner.incarnation, owner.ready.export)
                    self._link.send(reader.incarnation, up)
        if not self._all_ready.done():
            self._all_ready.set_result(None)

    def _down(self, dead: Incarnation) -> None:
        slot = self._supervisor.slots[dead.worker_id]
        why = f": {slot.reason}" if slot.reason else ""
        self._fail(StartError(f"worker {dead.worker_id} died while it was measured{why}"))

    def _given_up(self, slot: WorkerSlot) -> None:
        self._fail(self._supervisor.cannot_start(slot))

    def _fail(self, error: StartError) -> None:
        if self._all_ready.done():
            self._received.put_nowait(error)
        else:
            self._all_ready.set_exception(error)

    async def _close(self) -> None:
        self.is_closing = True
        if not self._all_ready.done():
            self._all_ready.cancel()
        await self._supervisor.stop(lambda worker: self._link.send(worker, wire.Stop()))
        self._link.close()
        self._run_dir.remove()
