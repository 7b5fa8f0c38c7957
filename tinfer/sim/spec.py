"""What is simulated: engines, workers, requests and how the master decides. Data only.

Equal specs give equal runs. Nothing here knows of a wall clock: all times are simulated seconds
from the start of the run.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, runtime_checkable

from msgspec import Meta, Struct

from tinfer.core.costs import CostModel
from tinfer.core.lengths import Lengths, certain
from tinfer.core.types import Capacity, Role, Route, SchedulerConfig
from tinfer.predict.asked import End, Features

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0.0)]

# A message between master and worker, one way: ZeroMQ over a local socket, encoding, and the wait
# for the loop on the other side. Source: benchmarks/results/added_latency_cpu.json, rounded.
MESSAGE_S = 0.0002
# How often the master looks at time passing. Source: load reports come every 100 ms in the paper
# (arXiv 2401.11181, section 3.2).
TICK_S = 0.1
# About 30 years. Beyond it the sums of such a time and a message's are no longer exact.
LATEST_ARRIVAL_S = 1e9


class SimRequest(Struct, frozen=True, kw_only=True):
    """One request: what a client asks for, and how long its answer truly is.

    `output_tokens` is the true length, which only the oracle sees; `max_output_tokens` what the
    client allows. `block_hashes` are chained hashes of the prompt's leading whole blocks, as many
    as could be shared with another request. `patience_s`: the client leaves so long after its
    arrival unless it is answered by then; None: never. `features` are for predictors that learn.
    """

    request_id: str
    arrival_s: Seconds
    prompt_tokens: Positive
    output_tokens: Positive
    max_output_tokens: Positive
    task: str = ""
    block_hashes: tuple[int, ...] = ()
    route: Route | None = None
    patience_s: float | None = None
    features: Features = Features()


def check_arrival(request_id: str, arrival_s: float) -> None:
    """Raises `ValueError` for a time that cannot be simulated."""
    if not 0.0 <= arrival_s <= LATEST_ARRIVAL_S:
        raise ValueError(
            f"{request_id} arrives at {arrival_s:g} s, which is not between 0 and "
            f"{LATEST_ARRIVAL_S:g} s"
        )


class Predictor(Protocol):
    """Says how long an answer will be. One object may serve many runs, so it keeps no state, but
    for a `Learner`."""

    def predict(self, request: SimRequest) -> Lengths: ...


@runtime_checkable
class Learner(Predictor, Protocol):
    """A predictor of one run, which is told how that goes."""

    def observe(self, request: SimRequest, output_tokens: int, end: End) -> None:
        """The request is over for its client, who has so many tokens."""
        ...


class Oracle:
    """Knows every length."""

    def predict(self, request: SimRequest) -> Lengths:
        return certain(request.output_tokens)


class EngineSpec(Struct, frozen=True, kw_only=True):
    """One engine: what its steps cost and what it can hold. Names are vLLM's where it has them.

    `victim`: which running request gives way when blocks run out, the one admitted last (vLLM) or
    the one with the fewest tokens generated, of several the youngest (our scheduler subclass).
    `watermark`: share of the blocks that stays free when a request is admitted beside others.
    `chunked_prefill` false: a prompt is scheduled whole or not at all, and a step has only prompts
    or only decodes, prompts first. `prefill_order`: which prompts a step computes first, those that
    run and then those that wait (`fcfs`, vLLM), or of all of them those with the fewest tokens left
    (`srpt`). `pads_chunks`: a step of prompts alone takes as long as one of
    `max_num_batched_tokens` prompt tokens, the rest of which are zeros that look back at nothing.
    `prefill_tax`: by what share prompts take longer, all of a step without decodes and what they
    add to one with (in the paper, arXiv 2401.11181 section 5.2.2, a length predictor runs beside
    them). `noise`: standard deviation of the logarithm of each step's time; its mean stays.
    `num_devices`: what counts in resource time.

    Raises `ValueError` for `srpt` or `pads_chunks` without chunks.
    """

    costs: CostModel = CostModel()
    num_blocks: Positive
    block_tokens: Positive = 16
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 2048
    chunked_prefill: bool = True
    prefill_order: Literal["fcfs", "srpt"] = "fcfs"
    pads_chunks: bool = False
    prefill_tax: Annotated[float, Meta(ge=0.0)] = 0.0
    prefix_caching: bool = True
    victim: Literal["newest", "least-progress"] = "newest"
    watermark: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    noise: Annotated[float, Meta(ge=0.0)] = 0.0
    num_devices: Positive = 1

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        if not self.chunked_prefill and (self.prefill_order != "fcfs" or self.pads_chunks):
            raise ValueError("prefill_order srpt and pads_chunks need chunked_prefill")

    @property
    def capacity(self) -> Capacity:
        """The same as the scheduler is told of a worker."""
        return Capacity(
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            max_num_seqs=self.max_num_seqs,
            chunk_tokens=self.max_num_batched_tokens,
        )


class WorkerSpec(Struct, frozen=True, kw_only=True):
    """A tinfer worker."""

    worker_id: str
    role: Role
    engine: EngineSpec


class SimSpec(Struct, frozen=True, kw_only=True):
    """One run of tinfer's own scheduler over simulated workers.

    The order of `workers` means nothing; `requests` are in any order, and those that arrive at one
    moment come in the order of this list. `tick_s` None: no ticks. `post_steps` false withholds
    `Stepped` from the scheduler. `seed` is of the engines' noise; the scheduler has its own.
    """

    workers: tuple[WorkerSpec, ...]
    requests: tuple[SimRequest, ...]
    scheduler: SchedulerConfig = SchedulerConfig()
    predictor: Predictor = Oracle()
    message_s: Seconds = MESSAGE_S
    tick_s: Annotated[float, Meta(gt=0.0)] | None = TICK_S
    post_steps: bool = True
    seed: int = 0
