"""Everything that crosses the sockets between the master and its workers.

One tagged union per direction and one typed decoder for each: a message that is not in the union,
or has a field that is not declared, is an error at once. Plain msgpack data only. The hand-off
descriptors (`Export`, `Geometry`) belong to `worker/kv`; the master passes them on unread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from tinfer.core.sampling import SamplingSpec, TokenLogprobs

# No message comes near it: an answer's logprobs for a prompt of a million tokens take half of it.
MAX_MESSAGE_BYTES = 1 << 30
_MAX_SHOWN_CHARS = 200

# What the receiver can reckon with: no NaN, no infinity; token ids are kept as int32.
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
MAX_TOKEN_ID = 2**31 - 1
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]


class LeaseId(Struct, frozen=True, forbid_unknown_fields=True):
    """One row of one worker's lease table, in one of its incarnations."""

    slot: int
    generation: int


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a decode worker finds the KV blocks of a finished prefill.

    `blocks` is the owner's encoded `SourceBlocks` (`worker/kv`), opaque to the master.
    """

    worker_id: str
    worker_generation: int
    lease: LeaseId
    num_tokens: int
    num_blocks: int
    blocks: bytes


# --- master → worker -------------------------------------------------------------------------


class Start(Struct, tag=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Compute a request: all of it (`whole`), its prefill, or its decode from a `source`.

    `prompt` is little-endian int32 token ids: 20K ids encode and decode as one copy. So are
    `forced_tokens`: what the client has of the answer already and the prompt does not hold. They
    are emitted first, one per step, as if they had been sampled; a prefill takes the first one.
    `cached_tokens` of a `decode` is the prefill side's prefix hit, carried for usage.
    """

    request_id: str
    kind: Literal["whole", "prefill", "decode"]
    prompt: bytes
    sampling: SamplingSpec
    source: Source | None = None
    forced_tokens: bytes = b""
    cached_tokens: int = 0


class Resume(Struct, tag=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A preempted request goes on: with the blocks of `source`, of its prompt and all that it has
    emitted, or (None) by computing them again. Unknown ids are ignored; their source is let go."""

    request_id: str
    source: Source | None = None


class Abort(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Stop these requests; unknown ones are ignored, since they may just have finished."""

    request_ids: list[str]


class SetBudget(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """From the next step on, compute at most so many prompt tokens per step, 0 for none; None: as
    many as a step takes. What decodes and what is pulled never waits for it."""

    prefill_tokens: Annotated[int, Meta(ge=0)] | None


class ReleaseLease(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """No reader will come, or it is dead: end the lease and free its blocks."""

    lease: LeaseId


class ExtendLease(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The reader lives: move the lease's deadline."""

    lease: LeaseId
    extra_s: Seconds


class PeerUp(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Another worker is ready; `export` is its `Ready.export`, to be mapped at the first pull."""

    worker_id: str
    generation: int
    export: bytes


class PeerDown(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """That incarnation is dead: close its mappings once pulls from it have stopped."""

    worker_id: str
    generation: int


class Wake(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Look at the lease table now: a reader has just marked one of its leases done."""


class Ping(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Say that you are there: answered with `Pong` between two steps."""


class Stop(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Leave the loop, close everything and exit with code 0."""


ToWorker = (
    Start
    | Resume
    | Abort
    | SetBudget
    | ReleaseLease
    | ExtendLease
    | PeerUp
    | PeerDown
    | Wake
    | Ping
    | Stop
)


# --- worker → master -------------------------------------------------------------------------


class WorkerStats(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the engine holds and has done, as of the message that carries it.

    Counters grow for the life of one incarnation. `num_steps` are the steps that computed anything,
    `busy_s` the seconds spent in them. `num_computed_prompt_tokens` includes what is computed again
    after a preemption. `num_used_blocks` counts blocks owned by a request or held under a lease;
    blocks that only the prefix cache remembers are free.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_free_blocks: int = 0
    num_open_leases: int = 0
    num_mapped_peers: int = 0
    num_stale_mappings: int = 0
    num_steps: int = 0
    busy_s: Seconds = 0.0
    num_computed_prompt_tokens: int = 0
    num_recomputed_pulled_tokens: int = 0
    num_preemptions: int = 0
    num_pulls: int = 0
    num_failed_pulls: int = 0
    pulled_bytes: int = 0
    pull_s: Seconds = 0.0


class Ready(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The engine is built and serves; the first message of an incarnation that starts well.

    `export` is what peers need to map this worker's KV memory (`worker/kv`), opaque to the master.
    `kv_format` is what has to be equal for blocks to move between two workers, in words.
    """

    pid: int
    max_model_len: int
    block_tokens: int
    num_blocks: int
    kv_bytes: int
    max_num_seqs: int
    chunk_tokens: int
    vocab_size: int
    transport: str
    device: str
    dtype: str
    engine: str
    export: bytes
    start_s: dict[str, float] = {}
    kv_format: dict[str, str] = {}


class CannotStart(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The engine could not be built; the worker exits after this."""

    reason: str


class Output(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one engine step added to one request.

    `num_output_tokens` and `text_len` are totals after this output, so that the master can forward
    just what the client lacks: a decode worker repeats the first token, and text is matched by
    length, never by content. `source` is set when a prefill ended with its blocks held; together
    with a `finish_reason` it means that nobody will read them (a stop string within the first
    token) and that the master is to release the lease.
    """

    request_id: str
    token_ids: list[TokenId]
    num_output_tokens: int
    text: str
    text_len: int
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int | None = None
    source: Source | None = None


class Step(Struct, tag=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One engine step: every request's new tokens in one message.

    `progress` are the prompts of which a chunk was computed and that are not done, each with the
    prompt tokens that are, cached ones included; `preempted` the requests that lost their blocks
    since the last step and wait for a `Resume`. Either alone makes a step worth
    telling: then there are no outputs.
    """

    outputs: list[Output]
    stats: WorkerStats
    progress: list[tuple[str, int]] = []
    preempted: list[str] = []


class Refused(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The engine does not take this request; `client_fault` tells a 400 from a 500."""

    request_id: str
    message: str
    client_fault: bool


class PullDone(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The reader has stopped: copied (`ok`), or failed and the prompt is recomputed here."""

    request_id: str
    ok: bool
    reason: str
    num_bytes: int
    copy_s: Seconds
    handoff_s: Seconds


class LeasesEnded(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The owner has freed the blocks of these leases."""

    leases: list[LeaseId]
    stats: WorkerStats


class LeasesOverdue(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """These leases are past their deadline; the owner asks, and frees nothing by itself."""

    leases: list[LeaseId]


class Aborted(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The engine no longer computes these requests (their blocks may still wait for a reader)."""

    request_ids: list[str]


class Idle(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The engine has just run out of work; carries the figures that a last step left behind."""

    stats: WorkerStats


class Pong(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The answer to a `Ping`."""


class Fault(Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The engine broke; the worker exits after this."""

    reason: str


ToMaster = (
    Ready
    | CannotStart
    | Step
    | Refused
    | PullDone
    | LeasesEnded
    | LeasesOverdue
    | Aborted
    | Idle
    | Pong
    | Fault
)

Message = TypeVar("Message")

_ENCODER = msgspec.msgpack.Encoder()
_TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_TO_MASTER: msgspec.msgpack.Decoder[ToMaster] = msgspec.msgpack.Decoder(ToMaster)


def encode(message: Struct) -> bytes:
    """One message as msgpack."""
    return _ENCODER.encode(message)


def decode_to_worker(data: Any) -> ToWorker:
    """A message for a worker. Raises `msgspec.DecodeError` for anything else."""
    return checked(_TO_WORKER, data)


def decode_to_master(data: Any) -> ToMaster:
    """A message for the master. Raises `msgspec.DecodeError` for anything else."""
    return checked(_TO_MASTER, data)


def decode_opaque(kind: type[Message], data: Any) -> Message:
    """What one worker wrote for another, `kind` of `worker/kv`. Raises `msgspec.DecodeError`."""
    return checked(msgspec.msgpack.Decoder(kind), data)


def shown(error: BaseException) -> str:
    """An error of a decoder as one short line; it can quote what it has met."""
    return ascii(str(error))[1:-1][:_MAX_SHOWN_CHARS]


def checked(decoder: msgspec.msgpack.Decoder[Message], data: Any) -> Message:
    """What a decoder makes of bytes. Raises `msgspec.DecodeError`, and nothing else."""
    try:
        return decoder.decode(data)
    # msgspec lets these two through; the second comes of an unknown field that nests too deeply.
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
