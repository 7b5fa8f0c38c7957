"""A request's moments as slices of time, each in the row of the master or of a worker.

Its phases follow each other without a gap, from its arrival to its end: `queued` at the master,
`prefill` on a worker, `hand-off` there too, as long as its blocks are held for their reader, and
`decode`; after a preemption `preempted`, and after the death of its worker `queued` again. Beside
them lies what another worker does for it meanwhile: `pull`, and after a preemption `reprefill`.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from tinfer.master.timeline import Mark
from tinfer.master.tracing.recorder import RequestRecord
from tinfer.wire.messages import PullDone

MASTER = ""


class Slice(Struct, eq=False):
    """From `start_s` to `end_s` on the worker `place`, or the master. `inner` lie within it, as do
    `instants`; `follows` is what the request did before, elsewhere."""

    name: str
    place: str
    start_s: float
    end_s: float = 0.0
    args: dict[str, Any] = field(default_factory=dict)
    inner: list[Slice] = field(default_factory=list)
    instants: list[tuple[str, float]] = field(default_factory=list)
    follows: Slice | None = None
    lane: int = 0


def slices_of(record: RequestRecord, now_s: float) -> list[Slice]:
    """The slices of a request, in the order in which they began; what runs still ends `now_s`.

    Takes moments in any order, as workers that make no sense would cause them.
    """
    reading = _Reading(record.arrived_s)
    for mark in record.marks:
        reading.take(mark)
    reading.end(now_s if record.ended_s is None else record.ended_s)
    about: dict[str, Any] = {
        "request": record.response_id or record.request_id,
        "sequence": record.request_id,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "end": record.end or "running",
    }
    for one in reading.slices:
        one.args = about | one.args
    return reading.slices


class _Reading:
    """Goes through the moments of a request, and knows what it does after each."""

    def __init__(self, arrived_s: float) -> None:
        self.slices: list[Slice] = []
        self._pull: Slice | None = None
        self._reprefill: Slice | None = None
        self._last: Slice | None = None
        self._phase: Slice | None = None
        self._is_split = False
        self._is_held = False
        self._chunk_s = arrived_s
        # What a preemption has interrupted.
        self._interrupted = "decode"
        self._enter("queued", MASTER, arrived_s)

    def take(self, mark: Mark) -> None:
        """The next moment."""
        at_s, worker_id = mark.at_s, mark.worker_id
        match mark.what:
            case "prefill" | "whole":
                self._started(worker_id, at_s, is_split=mark.what == "prefill")
            case "decode":
                if self._phase is not None and self._phase.name != "hand-off":
                    self._close_phase(at_s)
                self._begin_pull(worker_id, at_s)
            case "chunk":
                self._chunk(mark)
            case "token":
                if self._phase is not None:
                    self._phase.instants.append(("first token", at_s))
                self._prefilled(at_s)
            case "held":
                self._prefilled(at_s)
                self._is_held = True
            case "decodes":
                if self._phase is not None and self._phase.name == "prefill":
                    self._is_split = False
                    self._prefilled(at_s)
            case "pulled":
                self._pulled(mark.pull, at_s)
            case "preempted" | "resumed" | "recomputes":
                self._preemption(mark)
            case "reprefill":
                self._close(self._reprefill, at_s)
                self._reprefill = self._begin("reprefill", worker_id, at_s)
            case "reprefilled":
                self._close(self._reprefill, at_s)
                self._reprefill = None
            case "lost":
                self._lost(worker_id, at_s)

    def end(self, at_s: float) -> None:
        """Nothing comes after this."""
        phase = self._phase
        self._close_all(at_s)
        if phase is not None and phase.name == "hand-off" and not self._is_held:
            # Its first token was its last, so that nothing was handed off.
            self.slices.remove(phase)

    def _started(self, worker_id: str, at_s: float, is_split: bool) -> None:
        self._close_all(at_s)
        self._is_split, self._is_held = is_split, False
        self._enter("prefill", worker_id, at_s)

    def _chunk(self, mark: Mark) -> None:
        phase = self._phase
        if phase is not None and phase.name == "prefill":
            computed = {"computed_prompt_tokens": mark.num_tokens}
            phase.inner.append(Slice("chunk", phase.place, self._chunk_s, mark.at_s, computed))
            self._chunk_s = mark.at_s

    def _prefilled(self, at_s: float) -> None:
        phase = self._phase
        if phase is None or phase.name != "prefill":
            return
        if phase.inner:
            phase.inner.append(Slice("chunk", phase.place, self._chunk_s, at_s))
        self._close_phase(at_s)
        self._enter("hand-off" if self._is_split else "decode", phase.place, at_s)

    def _pulled(self, done: PullDone | None, at_s: float) -> None:
        pull = self._pull
        if pull is None or done is None:
            return
        pull.args = {"ok": done.ok, "num_bytes": done.num_bytes, "copy_s": done.copy_s}
        if done.ok:
            copy_start_s = max(pull.start_s, at_s - done.copy_s)
            pull.inner.append(Slice("copy", pull.place, copy_start_s, at_s))
        self._close_all(at_s)
        # The master is told of an answer's first output, and of no later one.
        recomputes = not done.ok and self._is_held
        phase = self._enter("prefill" if recomputes else "decode", pull.place, at_s)
        if not done.ok:
            phase.args["recomputed"] = True

    def _preemption(self, mark: Mark) -> None:
        at_s, phase = mark.at_s, self._phase
        if mark.what == "preempted":
            if phase is None or phase.place != mark.worker_id or phase.name == "preempted":
                return
            self._interrupted = phase.name
            self._close_phase(at_s)
            self._enter("preempted", mark.worker_id, at_s).instants.append(("preempted", at_s))
            self._is_held = False
        elif phase is not None and phase.name == "preempted":
            self._close_phase(at_s)
            if mark.what == "resumed":
                resumed = self._begin_pull(mark.worker_id, at_s)
            else:
                resumed = self._enter(self._interrupted, mark.worker_id, at_s)
                resumed.args["recomputed"] = True
            resumed.instants.append(("resumed", at_s))

    def _lost(self, worker_id: str, at_s: float) -> None:
        """That worker is dead."""
        for one in (self._phase, self._pull, self._reprefill):
            if one is not None and one.place == worker_id:
                one.args["worker_died"] = True
                self._close(one, at_s)
        if self._reprefill is not None and self._reprefill.place == worker_id:
            self._reprefill = None
        if self._pull is not None and self._pull.place == worker_id:
            self._pull = None
        if self._phase is not None and self._phase.place == worker_id:
            self._phase = None
        if self._phase is None and self._pull is None:
            self._enter("queued", MASTER, at_s)

    def _enter(self, name: str, place: str, at_s: float) -> Slice:
        """The next phase begins."""
        self._phase = phase = self._begin(name, place, at_s)
        self._chunk_s = at_s
        return phase

    def _begin(self, name: str, place: str, at_s: float) -> Slice:
        last = self._last
        follows = last if last is not None and last.place != place else None
        self._last = begun = Slice(name, place, at_s, at_s, follows=follows)
        self.slices.append(begun)
        return begun

    def _begin_pull(self, worker_id: str, at_s: float) -> Slice:
        self._close(self._pull, at_s)
        self._pull = self._begin("pull", worker_id, at_s)
        return self._pull

    def _close_phase(self, at_s: float) -> None:
        self._close(self._phase, at_s)
        self._phase = None

    def _close_all(self, at_s: float) -> None:
        for one in (self._phase, self._pull, self._reprefill):
            self._close(one, at_s)
        self._phase = self._pull = self._reprefill = None

    @staticmethod
    def _close(one: Slice | None, at_s: float) -> None:
        if one is not None:
            one.end_s = max(one.start_s, at_s)
