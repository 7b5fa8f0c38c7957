"""When the phases of one request began, and on which worker: what its `Trace` is made of.

The dispatcher notes each moment as it learns of it; figures are differences of those moments.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from tinfer.api.trace import Predicted, Trace
from tinfer.wire import messages as wire

StartKind = Literal["prefill", "decode", "whole"]
# `prefill`, `decode`, `whole`: sent to a worker. `chunk`: a part of the prompt is computed.
# `token`: the first one. `held`: a split prefill is done. `decodes`: the first output of a start
# of which no blocks are held. `pulled`: a reader has stopped. `preempted`, and then `resumed` from
# blocks that another worker holds, or `recomputes`. `reprefill`, `reprefilled`: there, for a
# preempted request. `lost`: the worker died.
What = Literal[
    StartKind,
    "chunk",
    "token",
    "held",
    "decodes",
    "pulled",
    "preempted",
    "resumed",
    "recomputes",
    "reprefill",
    "reprefilled",
    "lost",
]
NUM_DIGITS = 6  # microseconds: what a message between two processes costs is tens of them
# Of one request; what comes later is not kept, and its last slice is drawn to the end. Chunks leave
# room for the rest.
MAX_MARKS = 256
MAX_MARKS_WITH_CHUNKS = 128


class Mark(Struct, frozen=True, gc=False):
    """A moment at which a request enters another phase, on the dispatcher's clock; never one per
    token. `num_tokens` of a `chunk` are the prompt tokens that are computed by then."""

    at_s: float
    what: What
    worker_id: str = ""
    num_tokens: int = 0
    pull: wire.PullDone | None = None


class Timeline(Struct):
    """Moments in seconds on the dispatcher's clock, None where a phase has not been reached."""

    arrived_s: float
    route: Literal["split", "whole"] | None = None
    prefill_worker: str | None = None
    decode_worker: str | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    installed_s: float | None = None
    pull: wire.PullDone | None = None
    num_starts: int = 0
    ended_s: float | None = None
    marks: list[Mark] = []

    def note(
        self,
        what: What,
        now_s: float,
        worker_id: str = "",
        num_tokens: int = 0,
        pull: wire.PullDone | None = None,
    ) -> None:
        """Keep a moment for `/debug/trace`, unless the answer is over."""
        limit = MAX_MARKS_WITH_CHUNKS if what == "chunk" else MAX_MARKS
        if self.ended_s is None and len(self.marks) < limit:
            self.marks.append(Mark(now_s, what, worker_id, num_tokens, pull))

    def started(self, kind: StartKind, worker_id: str, now_s: float) -> None:
        """The request was sent to a worker. Of one that begins again the workers are the last
        ones, and its queue ended when it was first sent."""
        self.note(kind, now_s, worker_id)
        if kind != "prefill":
            self.decode_worker = worker_id
        if kind != "decode":
            self.route = "whole" if kind == "whole" else "split"
            self.prefill_worker = worker_id
            self.num_starts += 1
        if self.started_s is None:
            self.started_s = now_s

    def has_token(self, now_s: float) -> None:
        """A token is there; only the first one counts."""
        if self.first_token_s is None:
            self.first_token_s = now_s
            self.note("token", now_s)

    def ended(self, now_s: float) -> None:
        """The answer is complete or was cut; only the first end counts."""
        if self.ended_s is None:
            self.ended_s = now_s

    def pulled(self, pull: wire.PullDone, now_s: float) -> bool:
        """The decode worker has the blocks, or knows that it will not get them. What is pulled
        later, or into a worker that did both phases, was lost there and is no hand-off: False."""
        self.note("pulled", now_s, pull=pull)
        if self.route != "split" or self.pull is not None:
            return False
        self.pull = pull
        self.installed_s = now_s
        return True

    @property
    def handoff_s(self) -> float | None:
        """From the first token until its blocks were on the decode worker."""
        ok = self.pull is not None and self.pull.ok
        return _between(self.first_token_s, self.installed_s if ok else None)

    def trace(
        self,
        request_id: str,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        now_s: float,
        prediction: Predicted | None = None,
    ) -> Trace:
        """The figures of a request whose last token came at `now_s`."""
        decode_s = _between(self.first_token_s, now_s)
        gaps = output_tokens - 1
        pull = self.pull if self.pull is not None and self.pull.ok else None
        return Trace(
            request_id=request_id,
            route=self.route,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            queue_s=_between(self.arrived_s, self.started_s),
            prefill_s=_between(self.started_s, self.first_token_s),
            ttft_s=_between(self.arrived_s, self.first_token_s),
            handoff_s=self.handoff_s,
            copy_s=round(pull.copy_s, NUM_DIGITS) if pull else None,
            handoff_bytes=pull.num_bytes if pull else None,
            recomputed=self.pull is not None and not self.pull.ok,
            decode_s=decode_s,
            tpot_s=None if decode_s is None or gaps < 1 else round(decode_s / gaps, NUM_DIGITS),
            restarts=max(0, self.num_starts - 1),
            e2el_s=round(now_s - self.arrived_s, NUM_DIGITS),
            prediction=prediction,
        )


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else round(end_s - start_s, NUM_DIGITS)
