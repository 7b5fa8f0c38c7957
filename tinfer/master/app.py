"""The master process: builds every part, waits for readiness, serves, and takes all down again."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import time
from pathlib import Path

import uvloop
from aiohttp import web

from tinfer.api.connection import connections
from tinfer.api.limits import KEEP_ALIVE_S
from tinfer.api.parsing import Parsers
from tinfer.api.render import Renderer
from tinfer.api.server import create_app, create_runner
from tinfer.api.service import ModelCard
from tinfer.clock import MonotonicClock
from tinfer.config import ServeConfig
from tinfer.core import events
from tinfer.core.costs import CostModel
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Capacity, Role
from tinfer.errors import NoWorker, StartError, TinferError
from tinfer.master import logs, report, transport
from tinfer.master.cores import CoreClaims
from tinfer.master.event_log import EventLog
from tinfer.master.front import Front, api_options, open_front
from tinfer.master.hangs import HangWatch
from tinfer.master.lag import LagMeter
from tinfer.master.limits import client_descriptors, raise_descriptor_limit
from tinfer.master.listener import Door
from tinfer.master.loop import Dispatcher
from tinfer.master.otlp import open_spans
from tinfer.master.pairing import Pairs, pair
from tinfer.master.parsers import load_parsers, names_parsers
from tinfer.master.plan import Decision
from tinfer.master.predictor_state import PredictorState
from tinfer.master.preparation import prepare
from tinfer.master.request_log import open_request_log
from tinfer.master.rolling import Rolling
from tinfer.master.rundir import RunDirectory
from tinfer.master.scheduling import predictor_of, scheduler_config
from tinfer.master.service import MasterService, Mood
from tinfer.master.supervisor import Life, Supervisor, WorkerSlot
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation, MasterLink

log = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
# As often as load reports come in the paper (arXiv 2401.11181, section 3.2).
TICK_S = 0.1
# How often a drain looks whether the last request has ended.
_DRAIN_POLL_S = 0.02
# What a stop that may not wait still leaves the answers: enough for an error event each.
_LAST_WORDS_S = 1.0
# A Ctrl-C before there is anything to drain ends the command as the shell expects it.
_EXIT_INTERRUPTED = 128 + signal.SIGINT


def run(config: ServeConfig) -> int:
    """Serve until a signal; returns the exit code. Raises `StartError` if it cannot start."""
    logs.set_up(config)
    # Workers whose import process dies become our children, so that their end can be reaped.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    raise_descriptor_limit()
    with (
        open_front(config, os.environ) as (config, front),
        contextlib.closing(CoreClaims()) as claims,
    ):
        try:
            config, decision = prepare(config, claims)
        except KeyboardInterrupt:
            return _EXIT_INTERRUPTED
        return uvloop.run(_serve(config, decision, front))


async def _serve(config: ServeConfig, decision: Decision, front: Front) -> int:
    server = Server(config, decision, front)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.on_signal)
    try:
        await server.start()
        await server.stopped.wait()
        await server.drain()
    finally:
        await server.close()
        # What is frozen is never collected, which libraries that count their objects complain of.
        gc.unfreeze()
    return 0


class Server:
    """All parts of the master and their wiring."""

    def __init__(self, config: ServeConfig, decision: Decision, front: Front) -> None:
        self._config = config
        self._front = front
        self.model_dir, self._names = decision.model.directory, decision.model.names
        self._placements = placements = decision.placements
        self._pairs: Pairs | None = None
        self._report = report.StartReport()
        tuning = decision.tuning
        chosen = scheduler_config(config, CostModel() if tuning is None else tuning.costs)
        # Before there is anything on the disk that would have to go again.
        event_log = None if config.event_log is None else EventLog(Path(config.event_log), chosen)
        clock = MonotonicClock()
        request_log = open_request_log(config, clock.now_s() - time.time())
        self._door = Door(front.listener, client_descriptors(len(placements)), front.tls)
        self._run_dir = RunDirectory(front.port)
        self._supervisor = Supervisor(
            config,
            placements,
            self._run_dir,
            self.model_dir,
            self._worker_up,
            self._worker_down,
            self._worker_given_up,
            self._changed,
        )
        # First, so that there is who removes the directory whenever this process dies.
        self._supervisor.start_imports()
        self._run_dir.make()
        self._link = MasterLink(self._run_dir.socket_path, self._on_message)
        self._scheduler = Scheduler(chosen)
        predictor = predictor_of(config)
        self._predictor_state = PredictorState(predictor, config.predictor_state)
        self._dispatcher = Dispatcher(
            self._scheduler,
            self._link.send,
            clock,
            config.lease_ttl,
            predictor,
            self._names[0],
            config.predictor,
        )
        self._dispatcher.event_log = event_log
        self._dispatcher.request_log = request_log
        # While the zygote imports vLLM: the packages of OpenTelemetry take half a second.
        self._dispatcher.recorder.spans = open_spans(config, clock, self._names[0])
        for placement in placements:
            self._dispatcher.worker_event(
                events.WorkerExpected(placement.worker_id, placement.role)
            )
        self._rolling = Rolling(self._dispatcher, self._supervisor, self._link.send)
        self._hangs = HangWatch(self._supervisor, self._link.send, config.hang_timeout)
        self._all_ready = asyncio.get_running_loop().create_future()
        self._service: MasterService | None = None
        self._runner: web.AppRunner | None = None
        self.stopped = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._stop_deadline_s = 0.0
        self._lag = LagMeter(lambda: self._dispatcher.is_busy)
        self._tickers: list[asyncio.Task[None]] = []

    # --- start --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when requests are served. Raises `StartError`, or returns early on a signal."""
        self._changed()
        choice = await transport.choose(self._config, self._placements)
        waits_for_parsers = names_parsers(self._config)
        if not waits_for_parsers:
            self._supervisor.start_workers(choice.name)
        renderer = await Renderer.load(Path(self.model_dir), self._config.chat_template)
        parsers = await load_parsers(self._config, renderer, self.model_dir)
        if waits_for_parsers and not self.stopped.is_set():
            # Only now: a parser that cannot be had costs no start of an engine.
            self._supervisor.start_workers(choice.name)
        stopped = asyncio.create_task(self.stopped.wait())
        try:
            await asyncio.wait({self._all_ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if self.stopped.is_set():
            return
        self._all_ready.result()
        await self._open_api(renderer, parsers, choice)

    async def _open_api(
        self, renderer: Renderer, parsers: Parsers | None, choice: transport.Choice
    ) -> None:
        infos = [slot.ready for slot in self._supervisor.slots.values() if slot.ready is not None]
        card = ModelCard(
            names=self._names,
            root=self.model_dir,
            max_model_len=min(info.max_model_len for info in infos),
            vocab_size=min(info.vocab_size for info in infos),
            created_s=int(time.time()),
        )
        self._service = MasterService(
            self._dispatcher,
            self._scheduler,
            self._supervisor,
            self._rolling,
            card,
            self._lag,
            self._run_dir.path.name,
        )
        options = api_options(self._config, self._front, Path(self.model_dir))
        self._runner = create_runner(create_app(self._service, renderer, options, parsers))
        await self._runner.setup()
        # What is there for good: a full collection would go through all of it, 30 ms and more in
        # which no stream moves.
        gc.collect()
        gc.freeze()
        self._door.open(connections(self._runner, KEEP_ALIVE_S))
        self._service.mood = Mood.SERVING
        keep_state = self._predictor_state.keep(self._config.predictor_state_interval)
        endless = (self._tick(), self._hangs.run(), keep_state)
        self._tickers = [asyncio.create_task(one) for one in endless]
        self._lag.start()
        report.show(
            report.ready_block(
                self._config,
                self._supervisor,
                choice,
                self._front,
                self._names[0],
                self._report.elapsed_s,
            )
        )

    async def _tick(self) -> None:
        """Let the scheduler look at what only time changes."""
        while True:
            await asyncio.sleep(TICK_S)
            self._dispatcher.tick()

    def _changed(self) -> None:
        if self._service is None:
            self._report.workers(self._supervisor)

    # --- workers ------------------------------------------------------------------------------

    def _on_message(self, sender: Incarnation, message: wire.ToMaster) -> None:
        if isinstance(message, wire.Ready):
            if not self._supervisor.worker_ready(sender, message):
                self._link.send(sender, wire.Stop())  # nobody waits for it any more
            return
        if isinstance(message, wire.CannotStart | wire.Fault):
            self._supervisor.worker_failed(sender, message.reason)
            return
        if isinstance(message, wire.Pong):
            return self._hangs.answered(sender)
        slot = self._supervisor.slots.get(sender.worker_id)
        if slot is None or slot.incarnation != sender or slot.life is not Life.READY:
            return  # the word of an incarnation that is seen dead no longer counts
        try:
            self._dispatcher.handle(sender, message)
        except Exception as error:
            # What does not add up must not stay: its requests go on elsewhere once it is dead.
            log.exception("what %s.%d says makes no sense", *sender)
            reason = f"said what makes no sense: {error!r}"
            self._supervisor.end_worker(slot, reason, "nonsense")

    def _worker_up(self, slot: WorkerSlot) -> None:
        ready = slot.ready
        assert ready is not None
        for peer in self._supervisor.slots.values():
            if peer is not slot and peer.life is Life.READY and peer.ready is not None:
                self._link.send(slot.incarnation, wire.PeerUp(*peer.incarnation, peer.ready.export))
                self._link.send(peer.incarnation, wire.PeerUp(*slot.incarnation, ready.export))
        if self._service is not None:
            self._service.lower_max_model_len(ready.max_model_len)
        if self._pairs is not None:
            self._schedule_on(slot, self._pairs.role_of(slot.placement.role, ready.kv_format))
        elif all(s.life is Life.READY for s in self._supervisor.slots.values()):
            self._pair_all()

    def _pair_all(self) -> None:
        """All workers of the start are ready: who can hand blocks to whom is known only now."""
        slots = list(self._supervisor.slots.values())
        self._pairs = pairs = pair(
            [
                (slot.placement.worker_id, slot.placement.role, slot.ready.kv_format)
                for slot in slots
                if slot.ready is not None
            ]
        )
        if self._config.route == "split" and not pairs.can_split:
            self._all_ready.set_exception(StartError(f"--route split: {pairs.why_not}"))
            return
        self._supervisor.notes.update(pairs.notes)
        for slot in slots:
            self._schedule_on(slot, pairs.roles[slot.placement.worker_id])
        self._all_ready.set_result(None)

    def _schedule_on(self, slot: WorkerSlot, role: Role) -> None:
        ready = slot.ready
        assert ready is not None
        if self._config.enable_prefix_caching:
            self._dispatcher.block_tokens = ready.block_tokens
        self._dispatcher.worker_event(
            events.WorkerUp(
                *slot.incarnation,
                role=role,
                capacity=Capacity(
                    num_blocks=ready.num_blocks,
                    block_tokens=ready.block_tokens,
                    max_num_seqs=ready.max_num_seqs,
                    chunk_tokens=ready.chunk_tokens,
                ),
            )
        )

    def _worker_down(self, dead: Incarnation) -> None:
        self._dispatcher.worker_event(events.WorkerDown(*dead))
        for peer in self._supervisor.slots.values():
            if peer.life is Life.READY:
                self._link.send(peer.incarnation, wire.PeerDown(*dead))

    def _worker_given_up(self, slot: WorkerSlot) -> None:
        self._dispatcher.worker_event(events.WorkerGone(slot.placement.worker_id))
        if not self._all_ready.done():
            tail = self._supervisor.log_tail(slot)
            if tail and not slot.has_said_why:
                log.warning("end of the log of worker %s:\n%s", slot.placement.worker_id, tail)
            self._all_ready.set_exception(self._supervisor.cannot_start(slot))

    # --- stop ---------------------------------------------------------------------------------

    def on_signal(self) -> None:
        """The first signal drains, the second stops at once."""
        if self.stopped.is_set():
            self._stop_now.set()
        self.stopped.set()

    async def drain(self) -> None:
        """Refuse new requests and let running ones finish, within the configured time."""
        if self._service is None:
            return
        self._service.mood = Mood.DRAINING
        self._stop_deadline_s = time.monotonic() + self._config.shutdown_timeout
        while self._dispatcher.num_live and not self._stop_now.is_set():
            if time.monotonic() > self._stop_deadline_s:
                log.warning("%d requests cut off by the stop", self._dispatcher.num_live)
                break
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """Take everything down; also after a start that failed half-way."""
        error: TinferError = NoWorker("the server is stopping")
        self._lag.stop()
        for ticker in self._tickers:
            ticker.cancel()
        self._rolling.close()
        self._dispatcher.fail_all(error)
        self._door.close()
        if self._runner is not None:
            await self._end_answers(self._runner)
        if self._stop_now.is_set():
            self._supervisor.kill_all()
        await self._supervisor.stop(lambda worker: self._link.send(worker, wire.Stop()))
        self._link.close()
        if self._dispatcher.event_log is not None:
            self._dispatcher.event_log.close()
        if self._dispatcher.request_log is not None:
            # A disk that hangs does not keep the rest from ending.
            await asyncio.to_thread(self._dispatcher.request_log.close)
        if self._dispatcher.recorder.spans is not None:
            await asyncio.to_thread(self._dispatcher.recorder.spans.close)
        self._predictor_state.save()
        self._run_dir.remove()
        if self._all_ready.done() and not self._all_ready.cancelled():
            self._all_ready.exception()  # seen, also where nobody awaited it

    async def _end_answers(self, runner: web.AppRunner) -> None:
        """Let the handlers write what their streams still hold. A client that does not read can
        delay this until the deadline of the stop, and no longer than a moment after the second
        signal."""
        cleanup = asyncio.create_task(runner.cleanup())
        hurry = asyncio.create_task(self._stop_now.wait())
        left_s = max(0.0, self._stop_deadline_s - time.monotonic())
        await asyncio.wait({cleanup, hurry}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({cleanup}, timeout=_LAST_WORDS_S)
        hurry.cancel()
        cleanup.cancel()
        (outcome, _) = await asyncio.gather(cleanup, hurry, return_exceptions=True)
        if isinstance(outcome, Exception):
            log.error("the API did not end well", exc_info=outcome)
