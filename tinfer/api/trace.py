"""How an answer was served, for a client that asks with the header `X-Tinfer-Trace: 1`.

The master fills a `Trace` for every request; only an answer whose request had the header shows it,
under `tinfer`: in the body of a whole response, in a stream in the chunk that ends the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from tinfer.errors import InvalidRequest

TRACE_HEADER = "X-Tinfer-Trace"
# The central share of predicted lengths that an answer should lie in, four times out of five.
INTERVAL = 0.8
_WORDS = {"": False, "0": False, "false": False, "1": True, "true": True}


class Shown(Struct, frozen=True):
    """What a response tells of how it was served: a `Trace`, or the `Traces` of its answers."""


class Foretold(Struct, frozen=True):
    """What `usage` tells of predicted lengths: a `Predicted`, or the `Predictions` of answers."""


class Predicted(Foretold, frozen=True):
    """How long an answer was expected to be when its request came, in tokens: as likely longer than
    `median_tokens` as not, and with 80 % from `low_tokens` to `high_tokens`."""

    predictor: str
    median_tokens: float
    low_tokens: float
    high_tokens: float


class Predictions(Foretold, frozen=True):
    """Those of a request with several answers, in the order of its choices."""

    answers: list[Predicted]


class Trace(Shown, frozen=True, kw_only=True):
    """Figures of one answer, by the master's clock; durations in seconds.

    Time runs from the moment the scheduler accepts the request, with its prompt tokenised.
    `queue_s`: until it is sent to a worker; `prefill_s`: from there to its first token; `ttft_s`:
    until the first token is given to the response, the sum of the two; `handoff_s`: from the first
    token until its KV blocks are on the decode worker, waiting for a seat there included, and
    `copy_s` the copy alone of `handoff_bytes`; `decode_s`: from the first token to the last one;
    `tpot_s`: that per token after the first; `e2el_s`: until the last token.

    Null: `decode_worker` where a split request ended with its first token, what is about a hand-off
    where there was none, `tpot_s` below two tokens. `recomputed`: the hand-off failed and the
    decode worker computed the prompt again. `restarts`: how often the request began again because
    its worker had died; `prefill_worker` and `decode_worker` are then the last ones. `prediction`:
    the length that was predicted.
    """

    request_id: str
    route: Literal["split", "whole"] | None
    prefill_worker: str | None
    decode_worker: str | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float | None
    prefill_s: float | None
    ttft_s: float | None
    handoff_s: float | None
    copy_s: float | None
    handoff_bytes: int | None
    recomputed: bool
    decode_s: float | None
    tpot_s: float | None
    restarts: int
    e2el_s: float
    prediction: Predicted | None = None


class Traces(Shown, frozen=True):
    """The traces of a whole response with several answers, in the order of its choices."""

    answers: list[Trace]


def wants_trace(request: web.Request) -> bool:
    """Whether the client asks for the trace. Raises `InvalidRequest` for an unclear answer."""
    asked = request.headers.get(TRACE_HEADER, "").strip().lower()
    if asked not in _WORDS:
        raise InvalidRequest("must be 0 or 1", param=TRACE_HEADER)
    return _WORDS[asked]


def shown(traces: Sequence[Trace | None]) -> Shown | UnsetType:
    """The traces of all answers of one response; nothing where the service gives none."""
    known = [trace for trace in traces if trace is not None]
    if not known:
        return UNSET
    return known[0] if len(traces) == 1 else Traces(known)
