"""What has happened to requests and workers lately, in rings of bounded size.

The dispatcher calls it as it calls the tally: once per engine step, and otherwise when a request or
a worker enters another phase. Requests bring their own moments (`timeline.Mark`), so that nothing
is kept per token. At most 5,120 requests and refusals, 65,536 of their moments, 1,024 events of the
fleet and 16,384 messages of each worker are kept: 20 MB and 1 MiB per worker, however long the
server runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from msgspec import Struct

from tinfer.core import events
from tinfer.core.types import Role
from tinfer.errors import RequestNotFound
from tinfer.master.live import LiveRequest
from tinfer.master.prediction import end_of
from tinfer.master.timeline import Mark
from tinfer.master.tracing.steps import StepRing
from tinfer.wire.links import Incarnation
from tinfer.wire.messages import WorkerStats

MAX_REQUESTS = 4096
MAX_MARKS_IN_ALL = 65536
MAX_HAPPENINGS = 1024

FleetEvent = (
    events.WorkerUp
    | events.WorkerDown
    | events.WorkerExpected
    | events.WorkerGone
    | events.DrainAsked
)


class RequestRecord(Struct, frozen=True, kw_only=True):
    """One request as far as it has come. No prompt, no text: counts, ids and moments.

    `response_id` is the `id` of its answer, which ends in the `X-Request-Id`; `end` is how it ended
    (stop, length, abort or error), None while it runs.
    """

    request_id: str
    response_id: str
    arrived_s: float
    ended_s: float | None
    end: str | None
    marks: tuple[Mark, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    def is_called(self, name: str) -> bool:
        """Whether that is one of its ids."""
        return name in (self.request_id, *_names(self.response_id))


class Happening(Struct, frozen=True):
    """Something that took no time: of a worker, or (no `worker_id`) of the master."""

    at_s: float
    name: str
    worker_id: str = ""
    args: dict[str, Any] = {}


class Lately(Struct, frozen=True):
    """All that is to be shown of one stretch of time, by the dispatcher's clock; `steps` are rows
    of `steps.read`, and `roles` those of all workers that there are or were."""

    since_s: float
    now_s: float
    roles: dict[str, str]
    steps: dict[str, bytes]
    requests: list[RequestRecord]
    happenings: list[Happening]


class Spans(Protocol):
    """What is told of every request that ends, to tell others: `tracing.spans.SpanSender`."""

    def over(self, live: LiveRequest) -> None:
        """A request has ended. Never blocks, never raises."""
        ...

    def close(self) -> None:
        """Send what waits, within a bound. Blocks."""
        ...


class Recorder:
    """Keeps what has happened lately. All methods are called on the loop's thread."""

    def __init__(self, max_requests: int = MAX_REQUESTS, max_marks: int = MAX_MARKS_IN_ALL) -> None:
        self._max_requests = max_requests
        self._max_marks = max_marks
        self._requests: deque[RequestRecord] = deque()
        self._num_marks = 0
        self._steps: dict[str, StepRing] = {}
        self._refusals: deque[tuple[str, Happening]] = deque(maxlen=MAX_HAPPENINGS)
        self._fleet: deque[Happening] = deque(maxlen=MAX_HAPPENINGS)
        self._roles: dict[str, str] = {}
        self._were_up: set[str] = set()
        self._leaving: set[Incarnation] = set()
        self.spans: Spans | None = None

    # --- requests -----------------------------------------------------------------------------

    def over(self, live: LiveRequest) -> None:
        """A request has ended, and its timeline says when."""
        record = record_of(live)
        self._requests.append(record)
        self._num_marks += len(record.marks)
        while len(self._requests) > self._max_requests or self._num_marks > self._max_marks:
            self._num_marks -= len(self._requests.popleft().marks)
        if self.spans is not None:
            self.spans.over(live)

    def refused(self, live: LiveRequest, cause: str, now_s: float) -> None:
        """The scheduler has not taken a request."""
        args = {"request": live.generation.response_id, "cause": cause}
        happening = Happening(now_s, "refused", args=args)
        self._refusals.append((live.generation.response_id, happening))

    # --- workers ------------------------------------------------------------------------------

    def stepped(
        self, sender: Incarnation, stats: WorkerStats, now_s: float, num_emitting: int = 0
    ) -> None:
        """A worker has sent figures; `num_emitting` requests got tokens from its last step."""
        ring = self._steps.get(sender.worker_id)
        if ring is None:
            ring = self._steps[sender.worker_id] = StepRing()
        ring.add(sender.generation, stats, num_emitting, now_s)

    def fleet(self, event: FleetEvent, now_s: float) -> None:
        """A worker has come, gone, or been asked to leave."""
        worker_id = event.worker_id
        name = ""
        args: dict[str, Any] = {}
        match event:
            case events.WorkerExpected(_, role):
                self._roles[worker_id] = role.value
            case events.WorkerUp(_, generation, role):
                is_first = worker_id not in self._were_up
                self._were_up.add(worker_id)
                if is_first or role is Role.WHOLE:
                    self._roles[worker_id] = role.value
                name = "worker started" if is_first else "worker restarted"
                args = {"generation": generation, "role": self._roles[worker_id]}
            case events.WorkerDown(_, generation):
                has_left = Incarnation(worker_id, generation) in self._leaving
                self._leaving.discard(Incarnation(worker_id, generation))
                name = "worker stopped" if has_left else "worker died"
                args = {"generation": generation}
            case events.WorkerGone():
                name = "worker gone for good"
            case events.DrainAsked(_, generation):
                self._leaving.add(Incarnation(worker_id, generation))
                name = "drain asked for"
        if name:
            self._fleet.append(Happening(now_s, name, worker_id, args))

    def role_changed(self, worker_id: str, role: Role, reason: str, now_s: float) -> None:
        """The scheduler counts the worker as of that role from now on."""
        self._roles[worker_id] = role.value
        args = {"role": role.value, "reason": reason}
        self._fleet.append(Happening(now_s, "role changed", worker_id, args))

    # --- what is shown ------------------------------------------------------------------------

    def lately(
        self,
        running: Iterable[LiveRequest],
        now_s: float,
        seconds: float,
        name: str | None = None,
    ) -> Lately:
        """What the last `seconds` saw, requests that are `running` included; or only of those that
        have this id, which are all answers of a response. Raises `RequestNotFound`."""
        since_s = now_s - seconds
        if name is not None:
            return self._of_request(name, running, now_s, since_s)
        refusals = (one for _, one in self._refusals)
        return Lately(
            since_s,
            now_s,
            dict(self._roles),
            {worker_id: ring.copy(since_s) for worker_id, ring in self._steps.items()},
            [one for one in self._known(running) if one.ended_s is None or one.ended_s >= since_s],
            [one for one in (*self._fleet, *refusals) if one.at_s >= since_s],
        )

    def _of_request(
        self, name: str, running: Iterable[LiveRequest], now_s: float, since_s: float
    ) -> Lately:
        found = [
            one
            for one in self._known(running)
            if one.is_called(name) and (one.ended_s is None or one.ended_s >= since_s)
        ]
        refusals = [
            one for own, one in self._refusals if name in _names(own) and one.at_s >= since_s
        ]
        if not found and not refusals:
            raise RequestNotFound(f"no request {name[:80]!r} is kept", param="request_id")
        return Lately(since_s, now_s, dict(self._roles), {}, found, refusals)

    def _known(self, running: Iterable[LiveRequest]) -> list[RequestRecord]:
        """What is kept, and what runs."""
        return [*self._requests, *(record_of(live) for live in running if not live.is_counted)]


def record_of(live: LiveRequest) -> RequestRecord:
    """A request as far as it has come."""
    timeline, generation = live.timeline, live.generation
    has_ended = timeline.ended_s is not None
    return RequestRecord(
        request_id=live.stream.request_id,
        response_id=generation.response_id,
        arrived_s=timeline.arrived_s,
        ended_s=timeline.ended_s,
        end=end_of(live).value if has_ended else None,
        marks=tuple(timeline.marks),
        prompt_tokens=len(generation.prompt_token_ids),
        cached_tokens=live.cached_tokens,
        output_tokens=live.delivered_tokens,
    )


def _names(response_id: str) -> tuple[str, ...]:
    """The id of a response, and what of it is the `X-Request-Id`."""
    return (response_id, response_id.partition("-")[2]) if response_id else ()
