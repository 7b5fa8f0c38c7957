"""Where every request of a running server is, told from its event log while that is written.

A fault can then be aimed at a request in a given phase, and afterwards it can be said in which one
it was when it was struck, by the server's own clock, which all processes of one boot share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from tinfer.core import events as ev
from tinfer.master.event_log import Entry
from tinfer.wire.links import Incarnation

_ENTRY: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)
_READ_BYTES = 1 << 18

Phase = Literal["queued", "prefilling", "handoff", "copying", "decoding", "over"]
PHASES: tuple[Phase, ...] = ("queued", "prefilling", "handoff", "copying", "decoding")
# How a request went on after a death: started again, or its blocks pulled by another reader.
GoesOn = Literal["again", "held", "nowhere"]


class Followed(Struct, eq=False):
    """One request. `worker` computes it or pulls it, `source` holds its blocks; `history` has
    (seconds, phase) of every change."""

    request_id: str
    history: list[tuple[float, Phase]]
    worker: Incarnation | None = None
    source: Incarnation | None = None

    @property
    def phase(self) -> Phase:
        return self.history[-1][1]

    def phase_at(self, moment_s: float) -> Phase:
        """The phase that it had then; the first one where it had not arrived yet."""
        found = self.history[0][1]
        for since_s, phase in self.history:
            if since_s > moment_s:
                break
            found = phase
        return found

    @property
    def is_over(self) -> bool:
        return self.phase == "over"


class Loss(Struct):
    """A request whose worker died: how many tokens its client had, and how it went on."""

    request_id: str
    phase: Phase
    num_emitted: int
    goes_on: GoesOn = "nowhere"


class Death(Struct):
    """One incarnation, seen dead by the master; `up_s` is when its successor was ready."""

    worker: Incarnation
    down_s: float
    losses: list[Loss] = []
    up_s: float | None = None


class Follower:
    """What a log says so far; `take` is told its entries in order."""

    def __init__(self) -> None:
        self.requests: dict[str, Followed] = {}
        self.live: dict[str, Incarnation] = {}
        self.deaths: dict[Incarnation, Death] = {}
        self._waiting_losses: dict[str, list[Loss]] = {}
        # Requests that the scheduler failed: id, cause, and the workers that were up.
        self.failures: list[tuple[str, str, tuple[str, ...]]] = []

    def at(self, phase: Phase) -> list[Followed]:
        """The requests that are in that phase now."""
        return [one for one in self.requests.values() if one.phase == phase]

    def ids_on(self, worker: Incarnation) -> Iterator[Followed]:
        """What a death of that worker would strike."""
        for one in self.requests.values():
            if one.worker == worker or (one.worker is None and one.source == worker):
                yield one

    # --- entries ------------------------------------------------------------------------------

    def take(self, now_s: float, event: ev.Event, actions: Sequence[ev.Action]) -> None:
        """One line of the log."""
        self._event(now_s, event)
        for action in actions:
            self._action(now_s, action)

    def _event(self, now_s: float, event: ev.Event) -> None:
        match event:
            case ev.Arrived(request_id):
                self.requests[request_id] = Followed(request_id, [(now_s, "queued")])
            case ev.Cancelled(request_id):
                self._over(now_s, request_id)
            case ev.FirstToken(request_id):
                self._move(now_s, request_id, "decoding")
            case ev.Prefilled(request_id, worker_id, generation):
                one = self._move(now_s, request_id, "handoff")
                if one is not None:
                    one.worker, one.source = None, Incarnation(worker_id, generation)
            case ev.Pulled(request_id):
                one = self._move(now_s, request_id, "decoding")
                if one is not None:
                    one.source = None
            case ev.WorkerFinished(request_id, worker_id, generation):
                one = self.requests.get(request_id)
                if one is not None and one.worker == Incarnation(worker_id, generation):
                    self._over(now_s, request_id)
            case ev.WorkerUp(worker_id, generation):
                self._up(now_s, Incarnation(worker_id, generation))
            case ev.WorkerDown(worker_id, generation, remainders):
                emitted = {left.request_id: left.num_emitted for left in remainders}
                self._down(now_s, Incarnation(worker_id, generation), emitted)
            case _:
                pass

    def _action(self, now_s: float, action: ev.Action) -> None:
        match action:
            case ev.StartPrefill(request_id, worker_id, generation) | ev.StartWhole(
                request_id, worker_id, generation
            ):
                self._placed(now_s, request_id, "prefilling", worker_id, generation)
                self._goes_on(request_id, "again")
            case ev.StartDecode(request_id, worker_id, generation):
                self._placed(now_s, request_id, "copying", worker_id, generation)
                self._goes_on(request_id, "held")
            case ev.Fail(request_id, cause):
                self.failures.append((request_id, cause, tuple(sorted(self.live))))
                self._over(now_s, request_id)
            case _:
                pass

    def _placed(
        self, now_s: float, request_id: str, phase: Phase, worker_id: str, generation: int
    ) -> None:
        one = self._move(now_s, request_id, phase)
        if one is not None:
            one.worker = Incarnation(worker_id, generation)

    def _move(self, now_s: float, request_id: str, phase: Phase) -> Followed | None:
        one = self.requests.get(request_id)
        if one is not None:
            one.history.append((now_s, phase))
        return one

    def _over(self, now_s: float, request_id: str) -> None:
        if self._move(now_s, request_id, "over") is not None:
            del self.requests[request_id]
            self._waiting_losses.pop(request_id, None)

    # --- workers ------------------------------------------------------------------------------

    def _up(self, now_s: float, worker: Incarnation) -> None:
        self.live[worker.worker_id] = worker
        for death in self.deaths.values():
            if death.worker.worker_id == worker.worker_id and death.up_s is None:
                death.up_s = now_s

    def _down(self, now_s: float, dead: Incarnation, emitted: dict[str, int]) -> None:
        self.live.pop(dead.worker_id, None)
        self.deaths[dead] = death = Death(dead, now_s)
        for one in list(self.ids_on(dead)):
            loss = Loss(one.request_id, one.phase, emitted.get(one.request_id, 0))
            death.losses.append(loss)
            self._waiting_losses.setdefault(one.request_id, []).append(loss)
            is_held = one.phase == "copying" and one.source != dead
            one.worker = None
            one.source = one.source if is_held else None
            one.history.append((now_s, "handoff" if is_held else "queued"))

    def _goes_on(self, request_id: str, how: GoesOn) -> None:
        for loss in self._waiting_losses.pop(request_id, ()):
            loss.goes_on = how


class LogFollower(Follower):
    """Reads the log of one server as far as it is written; `poll` takes what is new."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._rest = b""
        self._has_head = False

    def close(self) -> None:
        self._file.close()

    def poll(self) -> bool:
        """Whether anything was new."""
        data = self._file.read(_READ_BYTES)
        if not data:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines and not self._has_head:
            self._has_head = True
            del lines[0]
        for line in lines:
            # Most lines, and they say nothing of where a request is.
            if b'{"type":"Stepped"' in line[:60] and line.endswith(b",[]]"):
                continue
            self.take(*_ENTRY.decode(line))
        return True
