"""Where the pure scheduler meets the world: messages become events, actions become messages.

The dispatcher owns every live request (its prompt, its sampling, its stream) and delivers what the
workers emit. A stream gets just what lies beyond what it has: tokens and text are counted, so the
first token, which the decode worker repeats, is delivered once, and so is all that a request emits
again that goes on elsewhere after its worker's death.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator
from typing import assert_never

from msgspec.structs import replace

from tinfer.api.service import Generation
from tinfer.clock import Clock
from tinfer.core import events
from tinfer.core.sampling import SamplingSpec
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Role, WaitingSnapshot
from tinfer.errors import EngineFailed, InvalidRequest, TinferError
from tinfer.master.attempts import Attempt, next_attempt, remainder, to_start
from tinfer.master.event_log import EventLog
from tinfer.master.live import LiveRequest, deliver, note_death
from tinfer.master.metrics.tally import ResumeForm, Tally
from tinfer.master.prediction import Prediction, told
from tinfer.master.request_log import RequestLog
from tinfer.master.scheduling import block_hashes
from tinfer.master.streams import RequestStream
from tinfer.master.timeline import StartKind, Timeline, What
from tinfer.master.tracing.recorder import FleetEvent, Lately, Recorder
from tinfer.master.translation import error_of, key_of, lease_of, owner_of, source_key, stepped
from tinfer.predict.asked import Predictor
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation

log = logging.getLogger(__name__)

Send = Callable[[Incarnation, wire.ToWorker], None]

# Of a prefill that is there for its blocks alone: no answer ends with this token.
NO_ANSWER = SamplingSpec(max_tokens=1, temperature=0.0, ignore_eos=True)


class Dispatcher:
    """Runs the scheduler for the live server. All methods are called on the loop's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        send: Send,
        clock: Clock,
        lease_ttl_s: float,
        predictor: Predictor,
        model: str = "",
        predictor_name: str = "",
    ) -> None:
        self._scheduler = scheduler
        self._send = send
        self._clock = clock
        self._lease_ttl_s = lease_ttl_s
        self._prediction = Prediction(predictor, model, predictor_name)
        self._request_log: RequestLog | None = None
        self.event_log: EventLog | None = None
        self._refused_role: str | None = None
        self.on_drained: Callable[[Incarnation], None] = _nobody_drains
        # Tokens per KV block, once a worker with a prefix cache has said; without it no prefix is
        # told from another.
        self.block_tokens: int | None = None
        # Roles that the scheduler has changed since the start, by worker.
        self.changed_roles: dict[str, Role] = {}
        self._live: dict[str, LiveRequest] = {}
        # Prefills of what a preempted request had, by the scheduler's id for them.
        self._reprefills: dict[str, tuple[str, Incarnation]] = {}
        self.stats: dict[Incarnation, wire.WorkerStats] = {}
        self.tally = Tally()
        self.recorder = Recorder()
        self.num_finished = 0
        # Starts of requests that had been started before, on a worker that died.
        self.num_restarts = 0

    # --- requests in --------------------------------------------------------------------------

    def submit(self, request_id: str, generation: Generation) -> RequestStream:
        """Accept a request. Raises `Overloaded` or `NoWorker` when the scheduler refuses it."""
        prompt_ids = generation.prompt_token_ids
        stream = RequestStream(request_id, self._cancelled)
        timeline = Timeline(self._clock.now_s())
        prompt = array("i", prompt_ids).tobytes()
        asked = self._prediction.asked(request_id, generation, prompt)
        unhinted, lengths = self._prediction.predict(asked)
        self._live[request_id] = live = LiveRequest(
            generation,
            prompt,
            array("i"),
            stream,
            timeline,
            Attempt(),
            asked,
            unhinted,
            lengths,
            told(lengths, self._prediction.name),
        )
        refusal = self._post(self._arrival(live), refusing=request_id)
        if refusal is not None:
            self._live.pop(request_id, None)
            stream.fail(refusal)
            self._log(live)
            raise refusal
        self.tally.accepted(generation)
        return stream

    def _arrival(self, live: LiveRequest) -> events.Arrived:
        """What the scheduler is told of a request."""
        asked, tokens = live.asked, self.block_tokens
        return events.Arrived(
            asked.request_id,
            prompt_tokens=asked.prompt_tokens,
            max_output_tokens=asked.max_output_tokens,
            route=live.generation.route,
            lengths=live.lengths,
            block_hashes=block_hashes(live.prompt, tokens) if tokens else (),
            priority=live.generation.hints.priority,
        )

    def tick(self) -> None:
        """Time has passed; does nothing while nobody is served."""
        if self._live:
            self._post(events.Tick())

    def _cancelled(self, request_id: str) -> None:
        self.tally.left()
        live = self._live.get(request_id)
        if live is not None:
            live.timeline.ended(self._clock.now_s())
        self._post(events.Cancelled(request_id))
        self._forget_if_over(request_id)

    def waiting(self, limit: int) -> list[WaitingSnapshot]:
        """Requests that wait, and why."""
        return self._scheduler.waiting(self._clock.now_s(), limit)

    def lately(self, seconds: float, request_id: str | None) -> Lately:
        """What the last `seconds` saw, of all or of one request. Raises `RequestNotFound`."""
        return self.recorder.lately(self._live.values(), self._clock.now_s(), seconds, request_id)

    @property
    def num_live(self) -> int:
        """Requests that a client still waits for."""
        return sum(1 for live in self._live.values() if not live.stream.ended)

    @property
    def is_busy(self) -> bool:
        """Whether any request is not over and let go of by all."""
        return bool(self._live)

    def fail_all(self, error: TinferError) -> None:
        """End every stream with an error, at the end of a shutdown that could not wait longer."""
        for live in list(self._live.values()):
            self._end(live, error, "stopping")
            self._over(live)

    # --- workers ------------------------------------------------------------------------------

    def worker_event(self, event: FleetEvent) -> None:
        """The fleet has changed."""
        now_s = self._clock.now_s()
        self.recorder.fleet(event, now_s)
        if isinstance(event, events.WorkerDown):
            return self._worker_down(event, now_s)
        self._post(event)
        if isinstance(event, events.WorkerUp) and event.role is Role.WHOLE:
            self.changed_roles.pop(event.worker_id, None)

    def _worker_down(self, event: events.WorkerDown, now_s: float) -> None:
        dead = Incarnation(event.worker_id, event.generation)
        note_death(self._live, self._reprefills, dead, now_s)
        self._post(replace(event, remainders=tuple(self._remainders())))
        self._bereave(dead)

    def _remainders(self) -> Iterator[events.Remainder]:
        """What would be left of each request that has emitted tokens."""
        for request_id, live in self._live.items():
            if live.emitted and not live.stream.ended:
                sampling = live.generation.sampling
                num_prompt = len(live.generation.prompt_token_ids)
                yield remainder(request_id, num_prompt, sampling, len(live.emitted))

    def ask_role(self, worker: Incarnation, role: Role) -> None:
        """Have a worker take a role once it has drained. Raises `InvalidRequest` if it cannot."""
        self._refused_role = None
        self._post(events.RoleAsked(*worker, role))
        if self._refused_role is not None:
            message = f"worker {worker.worker_id} stays as it is: {self._refused_role}"
            raise InvalidRequest(message, param="role")

    def _bereave(self, dead: Incarnation) -> None:
        """Forget what only a dead worker still had a part in."""
        self.tally.bereaved(dead.worker_id, self.stats.pop(dead, None))
        for prefill_id, (_, worker) in list(self._reprefills.items()):
            if worker == dead:
                del self._reprefills[prefill_id]
        for request_id, live in list(self._live.items()):
            live.workers.discard(dead)
            self._forget_if_over(request_id)

    def handle(self, sender: Incarnation, message: wire.ToMaster) -> None:
        """A message of a live incarnation; the caller has dropped those of older ones."""
        match message:
            case wire.Step(outputs, stats):
                step_s = self._clock.now_s()
                self._says(sender, stats, step_s, len(outputs))
                for request_id in message.preempted:
                    if (live := self._live.get(request_id)) is not None:
                        live.num_preempted += 1
                        live.timeline.note("preempted", step_s, sender.worker_id)
                for request_id, num_tokens in message.progress:
                    if (live := self._live.get(request_id)) is not None:
                        live.timeline.note("chunk", step_s, sender.worker_id, num_tokens)
                self._post(stepped(sender, message))
                for output in outputs:
                    if self._may_speak(sender, output.request_id):
                        self._output(sender, output, step_s)
            case wire.PullDone():
                self._pull_done(sender, message)
            case wire.LeasesEnded(leases, stats):
                self._says(sender, stats, self._clock.now_s())
                for lease in leases:
                    self._post(events.LeaseEnded(key_of(sender, lease)))
            case wire.LeasesOverdue(leases):
                for lease in leases:
                    self._post(events.LeaseOverdue(key_of(sender, lease)))
            case wire.Aborted(request_ids):
                for request_id in request_ids:
                    if self._may_speak(sender, request_id):
                        self._left(sender, request_id, answered=False)
            case wire.Idle(stats):
                self._says(sender, stats, self._clock.now_s())
            case wire.Refused():
                if self._may_speak(sender, message.request_id):
                    self._refused(sender, message)
            case wire.Ready() | wire.CannotStart() | wire.Fault() | wire.Pong():
                log.error("%s.%d sent %s to the dispatcher", *sender, type(message).__name__)
            case _:
                assert_never(message)

    def _says(
        self, sender: Incarnation, stats: wire.WorkerStats, now_s: float, num_emitting: int = 0
    ) -> None:
        self.stats[sender] = stats
        self.recorder.stepped(sender, stats, now_s, num_emitting)

    def _may_speak(self, worker: Incarnation, request_id: str) -> bool:
        """Whether it has a part in that request, or nobody waits for the request any more."""
        live = self._live.get(request_id)
        if live is None or worker in live.workers:
            return True
        log.error("%s.%d has no part in %s, of which it speaks", *worker, request_id)
        return False

    def _output(self, sender: Incarnation, output: wire.Output, step_s: float) -> None:
        request_id = output.request_id
        if request_id in self._reprefills:
            return self._reprefilled(sender, output)
        live = self._live.get(request_id)
        if live is not None:
            if output.cached_tokens is not None and live.delivered_tokens == 0:
                live.cached_tokens = output.cached_tokens
            if output.finish_reason == "error":
                self._end(live, EngineFailed("the engine failed on this request"), "engine")
            else:
                deliver(live, output, step_s, self._clock, self.tally)
        source = output.source
        if output.finish_reason is not None:
            self._left(sender, request_id, answered=output.finish_reason != "error")
            if source is not None:
                self._post(events.LeaseOpened(source_key(source), source.num_blocks))
        elif source is not None:
            if live is not None:
                live.source = source
                live.workers.discard(sender)
                live.timeline.note("held", self._clock.now_s(), sender.worker_id)
            self._post(events.Prefilled(request_id, *sender, source_key(source), source.num_blocks))
            self._forget_if_over(request_id)
        elif output.num_output_tokens == len(output.token_ids):
            if live is not None:
                live.timeline.note("decodes", step_s, sender.worker_id)
            self._post(events.FirstToken(request_id, *sender))

    def _reprefilled(self, sender: Incarnation, output: wire.Output) -> None:
        """Its token is nobody's; its blocks are for the request that it was started for."""
        source = output.source
        if source is None:
            self._left(sender, output.request_id, answered=False)
        elif output.finish_reason is None:
            live = self._live.get(self._reprefills.pop(output.request_id)[0])
            if live is not None:
                live.source = source
                live.timeline.note("reprefilled", self._clock.now_s(), sender.worker_id)
            key = source_key(source)
            self._post(events.Prefilled(output.request_id, *sender, key, source.num_blocks))
        else:
            self._left(sender, output.request_id, answered=False)
            self._post(events.LeaseOpened(source_key(source), source.num_blocks))

    def _pull_done(self, sender: Incarnation, message: wire.PullDone) -> None:
        live = self._live.get(message.request_id)
        if live is not None and live.timeline.pulled(message, self._clock.now_s()):
            handoff_s = live.timeline.handoff_s
            self.tally.handed_off(message.ok, handoff_s, message.copy_s, message.num_bytes)
        if not message.ok:
            log.warning("pull of %s failed: %s", message.request_id, message.reason)
        if live is not None and live.source is not None:
            owner = Incarnation(live.source.worker_id, live.source.worker_generation)
            self._send(owner, wire.Wake())
        self._post(events.Pulled(message.request_id, *sender, message.ok))

    def _refused(self, sender: Incarnation, message: wire.Refused) -> None:
        live = self._live.get(message.request_id)
        if live is not None:
            fault = InvalidRequest if message.client_fault else EngineFailed
            self._end(live, fault(message.message), "refused")
        self._left(sender, message.request_id, answered=False, refused=True)

    def _left(
        self, sender: Incarnation, request_id: str, answered: bool, refused: bool = False
    ) -> None:
        """A worker has let go of a request."""
        self._reprefills.pop(request_id, None)
        live = self._live.get(request_id)
        if live is not None:
            live.workers.discard(sender)
        self._post(events.WorkerFinished(request_id, *sender, answered=answered, refused=refused))
        self._forget_if_over(request_id)

    def _forget_if_over(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None and live.stream.ended and not live.workers:
            del self._live[request_id]
            self._over(live)
            self.num_finished += 1

    def _over(self, live: LiveRequest) -> None:
        """A request has ended: predictor, recorder and request log are told, once."""
        if not live.is_counted:
            live.is_counted = True
            self.recorder.over(live)
            self._prediction.over(live)
            self._log(live)

    def _log(self, live: LiveRequest) -> None:
        if self._request_log is not None:
            live.timeline.ended(self._clock.now_s())
            self._request_log.add(live, self._prediction.model)

    @property
    def request_log(self) -> RequestLog | None:
        """Where a line for each request goes when it has ended."""
        return self._request_log

    @request_log.setter
    def request_log(self, request_log: RequestLog | None) -> None:
        self._request_log = request_log
        if request_log is not None:
            self._prediction.keep_hashes()

    # --- the scheduler ------------------------------------------------------------------------

    def _post(self, event: events.Event, refusing: str | None = None) -> TinferError | None:
        """Let the scheduler see an event and carry out what it asks for. Returns the error of
        `refusing` if the scheduler fails that request."""
        refusal: TinferError | None = None
        now_s = self._clock.now_s()
        actions = self._scheduler.on_event(event, now_s)
        if self.event_log is not None:
            self.event_log.add(now_s, event, actions)
        for action in actions:
            if isinstance(action, events.Fail):
                error = error_of(action)
                if action.request_id == refusing:
                    refusal = error
                    self.tally.refuse(action.cause, action.limit)
                    self.recorder.refused(self._live[action.request_id], action.cause, now_s)
                else:
                    self._fail(action.request_id, error, action.cause)
            else:
                self._carry_out(action)
        return refusal

    def _carry_out(self, action: events.Action) -> None:
        match action:
            case events.StartPrefill(request_id, worker_id, generation):
                self._start(request_id, Incarnation(worker_id, generation), "prefill")
            case events.StartWhole(request_id, worker_id, generation):
                self._start(request_id, Incarnation(worker_id, generation), "whole")
            case events.StartDecode(request_id, worker_id, generation):
                self._start(request_id, Incarnation(worker_id, generation), "decode")
            case events.StartReprefill():
                self._start_reprefill(action)
            case events.Resume():
                self._resume(action)
            case events.AbortOn(request_id, worker_id, generation):
                self._send(Incarnation(worker_id, generation), wire.Abort([request_id]))
            case events.SetBudget(worker_id, generation, prefill_tokens):
                self._send(Incarnation(worker_id, generation), wire.SetBudget(prefill_tokens))
            case events.RoleChanged(worker_id, _, role, reason):
                log.info("worker %s is a %s worker now: %s", worker_id, role.value, reason)
                self.changed_roles[worker_id] = role
                self.tally.role_changed(worker_id, role)
                self.recorder.role_changed(worker_id, role, reason, self._clock.now_s())
            case events.RoleRefused(_, _, reason):
                self._refused_role = reason
            case events.Drained(worker_id, generation):
                self.on_drained(Incarnation(worker_id, generation))
            case events.ReleaseLease(key):
                self._send(owner_of(key), wire.ReleaseLease(lease_of(key)))
            case events.ExtendLease(key):
                self._send(owner_of(key), wire.ExtendLease(lease_of(key), self._lease_ttl_s))
            case events.Fail():
                raise AssertionError("failures are handled by the caller")
            case _:
                assert_never(action)

    def _start(self, request_id: str, worker: Incarnation, kind: StartKind) -> None:
        live = self._live[request_id]
        live.workers.add(worker)
        live.timeline.started(kind, worker.worker_id, self._clock.now_s())
        decode = kind == "decode"
        sampling = live.generation.sampling
        if not decode:
            live.attempt = next_attempt(sampling, len(live.emitted))
            self.num_restarts += live.timeline.num_starts > 1
        self._count_start(live, kind)
        prompt, forced_tokens, sampling = to_start(
            live.attempt, live.prompt, live.emitted, sampling
        )
        start = wire.Start(
            request_id,
            kind,
            prompt,
            sampling,
            source=live.source if decode else None,
            forced_tokens=forced_tokens,
            cached_tokens=live.cached_tokens if decode else 0,
        )
        self._send(worker, start)

    def _count_start(self, live: LiveRequest, kind: StartKind) -> None:
        attempt = live.attempt
        if kind == "decode":
            attempt.num_decodes += 1
            form: ResumeForm = "blocks"
            is_again = attempt.num_decodes > 1
        else:
            form = "prompt" if attempt.num_moved else "replay" if live.emitted else "fresh"
            is_again = live.timeline.num_starts > 1
        if is_again:
            self.tally.resumed[form] += 1
        elif kind != "decode":
            self.tally.routed["whole" if kind == "whole" else "split"] += 1

    def _start_reprefill(self, action: events.StartReprefill) -> None:
        live = self._live[action.request_id]
        worker = Incarnation(action.worker_id, action.generation)
        self._reprefills[action.prefill_id] = (action.request_id, worker)
        live.timeline.note("reprefill", self._clock.now_s(), worker.worker_id)
        tokens = live.prompt + live.emitted.tobytes()
        self._send(worker, wire.Start(action.prefill_id, "prefill", tokens, NO_ANSWER))

    def _resume(self, action: events.Resume) -> None:
        request_id, worker_id = action.request_id, action.worker_id
        source = None if action.lease is None else self._live[request_id].source
        if (live := self._live.get(request_id)) is not None:
            what: What = "recomputes" if source is None else "resumed"
            live.timeline.note(what, self._clock.now_s(), worker_id)
        self._send(Incarnation(worker_id, action.generation), wire.Resume(request_id, source))

    def _end(self, live: LiveRequest, error: TinferError, reason: str) -> None:
        """End its stream with an error, unless it has ended."""
        if not live.stream.ended:
            self.tally.failed_with(reason)
            live.timeline.ended(self._clock.now_s())
        live.stream.fail(error)

    def _fail(self, request_id: str, error: TinferError, cause: str) -> None:
        """The scheduler has given the request up: the worker that had it is dead or never was."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._end(live, error, cause)
            self._over(live)
            self.num_finished += 1


def _nobody_drains(worker: Incarnation) -> None:
    raise AssertionError(f"{worker.worker_id} has drained, and nobody asked for it")
