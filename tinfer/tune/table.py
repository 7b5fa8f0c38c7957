"""A tuning as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tinfer.tune.chunk import SATURATED_SHARE, throughput
from tinfer.tune.fit import predicted_s, relative_error
from tinfer.tune.points import HandoffPoint, StepKind, StepPoint
from tinfer.tune.tuning import Tuning

# Shares beyond which a box did other things meanwhile: of the median, between the quartiles of one
# point's samples, and of the worker's time, waiting for its core.
NOISY = 0.1
MUCH_WAITING = 0.05
_WIDTH = 12
_ERRORS = {
    "prefill": "prefill",
    "later-chunk": "later chunks",
    "decode": "decode",
    "mixed": "mixed (not fitted)",
    "handoff": "hand-off",
}


def lines_of(tuning: Tuning) -> Iterator[str]:
    """Tables of all points beside what the fitted costs say of them, and what follows."""
    identity = tuning.identity
    threads = f", {identity.num_threads} thread{'s' * (identity.num_threads > 1)}"
    ranks = f", {identity.tensor_parallel_size} ranks" if identity.tensor_parallel_size > 1 else ""
    yield f"{tuning.model} on {identity.device}{threads}{ranks}, {identity.dtype}"
    yield f"measured {tuning.date}, samples of a point lie {tuning.noise:.1%} apart (median)"
    yield from _section(tuning, "prefill", "prefill, a prompt alone in a step", _prefill_cells)
    yield from _section(tuning, "later-chunk", "later chunks of a prompt", _chunk_cells)
    yield from _section(tuning, "decode", "decode", _decode_cells)
    yield from _section(
        tuning, "mixed", "a prompt beside sequences that decode (a check: not fitted)", _mixed_cells
    )
    yield from _handoff_lines(tuning)
    yield ""
    yield from _result_lines(tuning)


def warnings_of(tuning: Tuning) -> Iterator[str]:
    """What makes the result doubtful."""
    if tuning.waited_share > MUCH_WAITING:
        yield (
            f"this box did other things as well: the worker waited for its core for "
            f"{tuning.waited_share:.0%} of its time; the waits are taken out, but not what sharing "
            "caches and memory with others took"
        )
    elif tuning.noise > NOISY:
        yield f"samples lie {tuning.noise:.0%} apart: this box did other things as well"
    if not tuning.chunk.is_saturated:
        yield (
            f"throughput may still grow beyond {tuning.chunk.threshold_tokens} tokens, the largest "
            "prompt that was measured"
        )


Cells = Callable[[StepPoint], dict[str, str]]


def _section(tuning: Tuning, kind: StepKind, title: str, cells_of: Cells) -> Iterator[str]:
    points = [point for point in tuning.steps if point.kind == kind]
    if not points:
        return
    rows = [
        cells_of(point)
        | _times(point.step_s, predicted_s(tuning.costs, point))
        | {"samples": str(len(point.samples_s)), "apart": f"{point.spread:.1%}"}
        for point in points
    ]
    yield from _table(title, rows)


def _handoff_lines(tuning: Tuning) -> Iterator[str]:
    if not tuning.handoffs:
        return
    rows = [
        _handoff_cells(point)
        | _times(point.handoff_s, tuning.costs.handoff_total_s(point.tokens))
        | {"samples": str(len(point.samples_s))}
        for point in tuning.handoffs
    ]
    yield from _table(f"hand-off by {tuning.transport}, order to report", rows)


def _table(title: str, rows: Sequence[dict[str, str]]) -> Iterator[str]:
    yield ""
    yield title
    widths = {name: max(_WIDTH, len(name) + 2) for name in rows[0]}
    yield "".join(f"{name:>{width}}" for name, width in widths.items())
    for row in rows:
        yield "".join(f"{row[name]:>{width}}" for name, width in widths.items())


def _times(measured_s: float, model_s: float) -> dict[str, str]:
    return {
        "ms": f"{1e3 * measured_s:.3f}",
        "fit ms": f"{1e3 * model_s:.3f}",
        "fit error": f"{relative_error(model_s, measured_s):+.1%}",
    }


def _prefill_cells(point: StepPoint) -> dict[str, str]:
    return {"tokens": str(point.prefill_tokens), "tokens/s": f"{throughput(point):,.0f}"}


def _chunk_cells(point: StepPoint) -> dict[str, str]:
    before = point.context_tokens / point.prefill_tokens - point.prefill_tokens / 2.0
    return {"tokens": str(point.prefill_tokens), "tokens before": f"{before:.0f}"}


def _decode_cells(point: StepPoint) -> dict[str, str]:
    return {
        "sequences": str(point.num_decodes),
        "KV tokens": f"{point.kv_tokens:,.0f}",
        "tokens/s": f"{point.num_decodes / point.step_s:,.0f}",
    }


def _mixed_cells(point: StepPoint) -> dict[str, str]:
    return {"tokens": str(point.prefill_tokens), "sequences": str(point.num_decodes)}


def _handoff_cells(point: HandoffPoint) -> dict[str, str]:
    return {
        "tokens": str(point.tokens),
        "MB": f"{point.num_bytes / 1e6:.2f}",
        "copy ms": f"{1e3 * point.copy_s:.3f}",
    }


def _result_lines(tuning: Tuning) -> Iterator[str]:
    costs, chunk, kv = tuning.costs, tuning.chunk, tuning.kv
    yield (
        f"step      {1e3 * costs.base_s:.3f} ms + {1e6 * costs.prefill_token_s:.2f} us per prompt "
        f"token + {1e9 * costs.prefill_context_s:.3f} ns per token it looks back at"
    )
    yield (
        f"          + {1e6 * costs.decode_seq_s:.2f} us per sequence "
        f"+ {1e9 * costs.kv_token_s:.3f} ns per KV token"
    )
    if tuning.fit.handoff_measured:
        yield (
            f"hand-off  {1e3 * costs.handoff_s:.3f} ms + {1e6 * costs.handoff_token_s:.3f} us "
            "per prompt token"
        )
    else:
        yield "hand-off  not measured: there is one worker"
    errors = ", ".join(
        f"{words} {tuning.fit.errors[kind]:.1%}"
        for kind, words in _ERRORS.items()
        if kind in tuning.fit.errors
    )
    yield f"errors    {errors}"
    yield (
        f"KV cache  {kv.num_tokens:,} tokens in {kv.num_blocks} blocks of {kv.block_tokens}, "
        f"{kv.bytes_per_token:,.0f} bytes each token"
    )
    yield (
        f"chunk     {chunk.chunk_tokens} tokens: from {chunk.threshold_tokens} on a prompt has "
        f"{SATURATED_SHARE:.0%} of the best {chunk.best_tokens_per_s:,.0f} tokens/s"
    )
