"""The request log: one JSON object per line, one line per finished request.

Written by the load generator and the server, read by the simulator, by the predictors and by
`from_log`. The rules that let it grow: a key is never renamed, given another unit or removed; a new
one comes with a default; a reader ignores keys that it does not know. So every version reads every
other, and `schema_version` tells only which keys a writer knew. No line depends on another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta, Struct

from tinfer.workloads.requests import Segment

SCHEMA_VERSION = 2

Tokens = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0.0)]


class LogRecord(Struct, frozen=True, kw_only=True):
    """One finished request, answered or failed. None means not known, never 0.

    What was asked:
    `request_id`: unique within the log.
    `arrival_s`: when it was due, in seconds from the start of the run; in a server's log, since
    1970, so that the logs of several starts go together.
    `task`, `tenant`, `session`, `turn`, `after`, `segments`: as in `requests.Request`; `segments`
    is a list of [seed, num_tokens], null where only the prompt's length is known; in a server's
    log the seeds are hashes, see `prefixes`.
    `model`: the name under which it was served.
    `prompt_head`, `prompt_signature`: what a predictor that learns keeps of a prompt, hashes of its
    beginning (hex digits) and of its n-grams (in JSON as base64), see tinfer/predict/features.py;
    "" where they were not made.
    `runs_to_bound`: the client had the answer go on until it was `max_output_tokens` long.
    `expected_output_tokens`, `priority`, `deadline_s`: the client's own words on the length of the
    answer, on its turn (lower goes first), and on how long it may take.
    `prompt_tokens`: length of the prompt, as the server counted it where it did.
    `max_output_tokens`: how many output tokens were asked for.

    What came of it:
    `output_tokens`: how many came.
    `finish_reason`: "stop", "length", "abort" or "error", as in the API.
    `error`: one line on what went wrong; null for an answered request.
    `sent_s`: when it left the client, on the clock of `arrival_s`; what lies between is the
    client's own lag, or its wait for a place under `--max-concurrency`.
    `ttft_s`: from leaving the client (in a server's log: from being accepted) to the first token.
    `e2el_s`: from the same moment to the last token; in a server's log also to where it was cut.
    `itl_s`: the gaps between consecutive writes of tokens, in order; null if not kept.

    How it was computed, as far as the writer can see:
    `route`: "split" or "whole"; null for a server that has no routes.
    `workers`: worker ids in the order in which they computed it, the prefill worker first.
    `handoff_s`: from prefill done to the blocks being installed on the decode worker.
    `cached_tokens`: prompt tokens that a prefix cache held.
    `predictor`, `predicted_output_tokens`: what predicted the answer's length at arrival, and its
    median; with 80 % it was to lie from `predicted_low_tokens` to `predicted_high_tokens`.
    """

    request_id: str
    arrival_s: Seconds
    prompt_tokens: Tokens
    max_output_tokens: Annotated[int, Meta(ge=1)]
    output_tokens: Tokens
    task: str = ""
    tenant: str = ""
    session: str = ""
    turn: Tokens = 0
    after: str | None = None
    segments: tuple[Segment, ...] | None = None
    finish_reason: str | None = None
    error: str | None = None
    sent_s: Seconds | None = None
    ttft_s: Seconds | None = None
    e2el_s: Seconds | None = None
    itl_s: tuple[Seconds, ...] | None = None
    route: str | None = None
    workers: tuple[str, ...] = ()
    handoff_s: Seconds | None = None
    cached_tokens: Tokens | None = None
    predicted_output_tokens: Annotated[float, Meta(ge=0.0)] | None = None
    predicted_low_tokens: Annotated[float, Meta(ge=0.0)] | None = None
    predicted_high_tokens: Annotated[float, Meta(ge=0.0)] | None = None
    predictor: str = ""
    model: str = ""
    prompt_head: Annotated[str, Meta(pattern="^([0-9a-f]{16})?$")] = ""
    prompt_signature: bytes = b""
    runs_to_bound: bool = False
    expected_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    priority: int = 0
    deadline_s: Seconds | None = None
    schema_version: Annotated[int, Meta(ge=1)] = SCHEMA_VERSION


LogFile = str | os.PathLike[str] | BinaryIO
_decoder = msgspec.json.Decoder(LogRecord)


def encode_record(record: LogRecord) -> bytes:
    """One line of the log with its newline, all keys written out."""
    return msgspec.json.encode(record) + b"\n"


def write_log(target: LogFile, records: Iterable[LogRecord]) -> None:
    """Write a log: over what stands at a path, or to where a binary file stands now."""
    lines = map(encode_record, records)
    if isinstance(target, str | os.PathLike):
        with open(target, "wb") as file:
            file.writelines(lines)
    else:
        target.writelines(lines)


def read_log(source: LogFile) -> list[LogRecord]:
    """Every record of a log, in its order; empty lines are skipped.

    A binary file is read from where it stands and stays open. Raises `ValueError` with the line's
    number for one that is not a record, such as the torn last line of a writer that was killed.
    """
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _decoded(file)
    return _decoded(source)


def _decoded(lines: Iterable[bytes]) -> list[LogRecord]:
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"line {number} of the request log: {error}") from error
    return records
