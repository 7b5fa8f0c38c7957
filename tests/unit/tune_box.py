"""Tunings made up from known costs, for tests of what is done with them."""

from __future__ import annotations

from tinfer.core.costs import CostModel
from tinfer.tune.chunk import choose_chunk
from tinfer.tune.fit import fit
from tinfer.tune.identity import Identity
from tinfer.tune.points import HandoffPoint, KvRoom, StepKind, StepPoint
from tinfer.tune.tuning import Tuning

COSTS = CostModel(
    base_s=6e-3,
    prefill_token_s=0.3e-3,
    prefill_context_s=1.5e-7,
    decode_seq_s=0.4e-3,
    kv_token_s=1e-7,
    handoff_s=2e-3,
    handoff_token_s=1e-6,
    source="a test",
)
SIZES = (16, 64, 256, 512, 1024, 4096)
IDENTITY = Identity(
    device="Some CPU @ 3 GHz",
    num_threads=1,
    model_hash="0123456789abcdef",
    weights_bytes=123,
    dtype="bfloat16",
    tensor_parallel_size=1,
    is_eager=True,
)
ROOM = KvRoom(
    num_blocks=511,
    block_tokens=128,
    kv_bytes=512 * 128 * 64,
    bytes_per_token=64.0,
    max_num_seqs=64,
    max_model_len=8192,
    step_tokens=4096,
)


def point(
    kind: StepKind,
    prefill: int = 0,
    before: int = 0,
    decodes: int = 0,
    kv: float = 0.0,
    factor: float = 1.0,
) -> StepPoint:
    """A step that takes what `COSTS` say, times `factor`."""
    context = prefill * (before + prefill / 2.0)
    seconds = factor * COSTS.step_s(prefill, decodes, kv, context)
    return StepPoint(
        kind=kind,
        prefill_tokens=prefill,
        context_tokens=context,
        num_decodes=decodes,
        kv_tokens=kv,
        samples_s=(seconds, 1.01 * seconds, 0.99 * seconds),
    )


def points() -> list[StepPoint]:
    """Some of each kind."""
    return [
        *(point("prefill", prefill=n) for n in SIZES),
        *(point("later-chunk", prefill=256, before=n) for n in (256, 1024, 4096)),
        *(point("decode", decodes=n, kv=80.0 * n) for n in (1, 4, 16, 64)),
        *(point("decode", decodes=n, kv=4000.0 * n) for n in (1, 4, 16)),
        *(point("mixed", prefill=n, decodes=4, kv=320.0) for n in (128, 512)),
    ]


def handoff(tokens: int) -> HandoffPoint:
    seconds = COSTS.handoff_total_s(tokens)
    return HandoffPoint(
        tokens=tokens,
        num_bytes=tokens * 64,
        samples_s=(seconds,),
        copy_samples_s=(0.1 * seconds,),
    )


def tuning(handoffs: bool = True) -> Tuning:
    """What a box with `COSTS` would give."""
    moved = [handoff(n) for n in (16, 1024, 4096)] if handoffs else []
    return Tuning(
        identity=IDENTITY,
        model="some/model",
        transport="shm" if handoffs else "none",
        versions={"tinfer": "0"},
        date="2026-11-21T12:00:00+00:00",
        repeats=3,
        seed=0,
        loop_s=1e-4,
        waited_share=0.0,
        kv=ROOM,
        steps=tuple(points()),
        handoffs=tuple(moved),
        fit=fit(points(), moved, "a test"),
        chunk=choose_chunk(points(), ROOM.block_tokens),
    )
