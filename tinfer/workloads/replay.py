"""From a request log back to a workload: the same requests, lengths and arrivals once more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tinfer.workloads.lengths import Limits
from tinfer.workloads.log import LogRecord
from tinfer.workloads.requests import Request, Segment
from tinfer.workloads.spec import on_the_grid

AS_LOGGED = Limits()


def from_log(
    records: Sequence[LogRecord], speed: float = 1.0, limits: Limits = AS_LOGGED
) -> list[Request]:
    """The logged requests as a workload by arrival, the first at 0, `speed` > 0 times as fast.

    An answer is as long as the logged one; after an error, or where none came, as long as was
    predicted, or as was asked for where nobody predicted. A record without segments gets one of its
    own, seeded by its id, so it shares no prefix; where there are segments, they are the prompt,
    whatever the server counted. `limits` scales and cuts prompts at the same places for equal
    leading segments, so what was shared stays shared.
    `after` is kept if that request is logged.
    Raises `ValueError` if two records have one id or `speed` is not above 0.
    """
    if not speed > 0.0:
        raise ValueError(f"speed = {speed:g} is not above 0")
    known = {record.request_id for record in records}
    if len(known) < len(records):
        raise ValueError("two records of the request log have the same request_id")
    start_s = min((record.arrival_s for record in records), default=0.0)
    return [
        _request(record, on_the_grid((record.arrival_s - start_s) / speed), limits, known)
        for record in sorted(records, key=lambda record: record.arrival_s)
    ]


def _request(record: LogRecord, arrival_s: float, limits: Limits, known: set[str]) -> Request:
    is_whole = record.error is None and record.output_tokens > 0
    answered = record.output_tokens if is_whole else _likely_tokens(record)
    return Request(
        request_id=record.request_id,
        arrival_s=arrival_s,
        task=record.task,
        segments=fitted(_segments(record), limits),
        output_tokens=limits.output(answered),
        tenant=record.tenant,
        session=record.session,
        turn=record.turn,
        after=record.after if record.after in known else None,
    )


def _likely_tokens(record: LogRecord) -> int:
    """Of an answer that nobody has seen whole."""
    predicted = record.predicted_output_tokens
    if predicted is None:
        return record.max_output_tokens
    return min(record.max_output_tokens, max(1, round(predicted)))


def _segments(record: LogRecord) -> tuple[Segment, ...]:
    return record.segments or (Segment(record.request_id, max(1, record.prompt_tokens)),)


def fitted(segments: Iterable[Segment], limits: Limits) -> tuple[Segment, ...]:
    """The segments under `limits`: their ends scaled, rounded and cut, emptied ones left out."""
    kept: list[Segment] = []
    end = fitted_end = 0
    for segment in segments:
        end += segment.num_tokens
        next_end = limits.prompt(end)
        if next_end > fitted_end:
            kept.append(Segment(segment.seed, next_end - fitted_end))
        fitted_end = next_end
    return tuple(kept)
