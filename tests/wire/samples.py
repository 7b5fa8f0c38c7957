"""At least one message of every type, with every field set once and left out once.

`python -m tests.wire.samples > tests/wire/golden.txt` writes what these messages are on the wire.
Do so only for a change of the wire that is meant: masters and workers of two versions never meet,
but a recorded message has to stay readable.
"""

from __future__ import annotations

import sys

from msgspec import Struct

from tinfer.core.sampling import SamplingSpec, StructuredSpec, TokenLogprobs
from tinfer.wire import control, messages
from tinfer.wire.control import CannotFork, Exited, Fork, Forked, Imported, WorkerSpec
from tinfer.wire.messages import (
    Abort,
    Aborted,
    CannotStart,
    ExtendLease,
    Fault,
    Idle,
    LeaseId,
    LeasesEnded,
    LeasesOverdue,
    Output,
    PeerDown,
    PeerUp,
    Ping,
    Pong,
    PullDone,
    Ready,
    Refused,
    ReleaseLease,
    Resume,
    SetBudget,
    Source,
    Start,
    Step,
    Stop,
    Wake,
    WorkerStats,
)

PROMPT = b"\x05\0\0\0\x2c\x01\0\0"  # token ids 5 and 300
LEASE = LeaseId(3, 70000)
SOURCE = Source("prefill-0", 2, LEASE, 20, 2, b"\x93\x01\xff\0")
STATS = WorkerStats(1, 2, 3, 4, 5, 6, 7, 8, 0.25, 9, 10, 11, 12, 13, 14, 0.5)
SAMPLING = SamplingSpec(
    max_tokens=64,
    min_tokens=2,
    temperature=0.5,
    top_p=0.25,
    top_k=20,
    min_p=0.125,
    seed=-7,
    presence_penalty=1.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.25,
    logit_bias={65: -100.0},
    allowed_token_ids=[1, 2],
    bad_words=["no"],
    stop=["漢", "\n"],
    stop_token_ids=[256],
    include_stop_str_in_output=True,
    ignore_eos=True,
    skip_special_tokens=False,
    spaces_between_special_tokens=False,
    logprobs=5,
    prompt_logprobs=-1,
    structured=StructuredSpec(
        "{}",
        "a+",
        ["x"],
        "root",
        True,
        "<tag>",
        disable_any_whitespace=True,
        whitespace_pattern=" ",
        reasoning_ended=False,
        template_kwargs="{}",
    ),
)
POSITION = TokenLogprobs([9, 8], [-0.5, -1.5], [1, 2], ["é", ""])
SPEC = WorkerSpec(
    worker_id="decode-1",
    generation=4,
    engine="fake",
    model_dir="/m",
    socket_path="/run/w.sock",
    log_path="/run/w.log",
    kv_transport="shm",
    device="cpu",
    cpus=[0, 1],
    environment={"A": "b"},
    engine_args={
        **{"dtype": "auto", "seed": 0, "gpu_memory_utilization": 0.5, "enforce_eager": True},
        "hf_overrides": {"a": [1, None]},
    },
    lease_ttl_s=10.0,
    fake={"step_s": 0.5, "num_blocks": 8},
)

TO_WORKER: list[messages.ToWorker] = [
    Start("r-1", "whole", PROMPT, SamplingSpec(max_tokens=1)),
    Start("r-2", "prefill", PROMPT, SAMPLING),
    Start(
        "r-3",
        "decode",
        PROMPT,
        SamplingSpec(16),
        SOURCE,
        forced_tokens=b"\x11\0\0\0",
        cached_tokens=16,
    ),
    Resume("r-3", SOURCE),
    Resume("r-3"),
    Abort(["r-1", "r-2"]),
    SetBudget(0),
    SetBudget(None),
    ReleaseLease(LEASE),
    ExtendLease(LEASE, 2.5),
    PeerUp("prefill-0", 2, b"\0export"),
    PeerDown("prefill-0", 2),
    Wake(),
    Ping(),
    Stop(),
]
TO_MASTER: list[messages.ToMaster] = [
    Ready(
        pid=99,
        max_model_len=2048,
        block_tokens=16,
        num_blocks=100,
        kv_bytes=1 << 33,
        max_num_seqs=256,
        chunk_tokens=512,
        vocab_size=512,
        transport="shm",
        device="cpu",
        dtype="bfloat16",
        engine="vllm",
        export=b"\x01",
        start_s={"engine": 0.25},
        kv_format={"dtype": "bfloat16"},
    ),
    CannotStart("no room"),
    Step([Output("r-1", [5], 1, "", 0)], WorkerStats()),
    Step(
        [
            Output("r-1", [5, 6], 2, "ab", 2, "stop", 256, [POSITION], [None, POSITION], 16),
            Output("r-2", [7], 1, "c", 1, stop_reason="c", source=SOURCE),
        ],
        STATS,
    ),
    Step([], STATS, [("r-3", 512), ("r-4", 0)], ["r-5"]),
    Refused("r-1", "too long", client_fault=True),
    PullDone("r-1", ok=False, reason="gone", num_bytes=1 << 32, copy_s=0.5, handoff_s=0.75),
    LeasesEnded([LEASE], STATS),
    LeasesOverdue([LEASE, LeaseId(0, 0)]),
    Aborted(["r-1"]),
    Idle(STATS),
    Pong(),
    Fault("step failed"),
]
CONTROL: list[control.Control] = [
    Fork(SPEC),
    Forked("decode-1", 4, 4242, forked=True),
    Forked("decode-1", 4, 4242, forked=False, note="WSL"),
    CannotFork("decode-1", 4, "--engine-arg x: no such engine argument"),
    Exited(4242, -9),
    Imported(6.5),
]


def encoded(message: Struct) -> bytes:
    """The bytes of any sample, in the codec of its channel."""
    if isinstance(message, control.Control):
        return control.pack(message)
    return messages.encode(message)


if __name__ == "__main__":
    for sample in [*TO_WORKER, *TO_MASTER, *CONTROL]:
        sys.stdout.write(f"{type(sample).__name__} {encoded(sample).hex()}\n")
