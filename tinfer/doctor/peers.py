"""Which GPU's process can read which other GPU's memory, tried for real, as a matrix of GB/s.

The trying is done by the probe that also decides the transport of `tinfer serve`, in processes of
its own: neither torch nor CUDA is loaded here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from msgspec import Struct

from tinfer.doctor.finding import Finding, ok, warning
from tinfer.master.gpus import VARIABLE, Gpu

# All pairs in one go; then what is left of it for a try per GPU, where one took the others down.
PROBE_TIMEOUT_S = 150.0
CHECK = "GPU peers"
_DIED = ("the probe ended with", "the probe took more than")
_ADVICE_PARTLY = (
    "KV blocks go through host memory where one pair cannot; give --prefill-devices and "
    "--decode-devices GPUs that can, or see nvidia-smi topo -p2p r"
)
_ADVICE_NONE = (
    "KV blocks go through host memory, which is slower; for peer access: --ipc=host in containers, "
    "IOMMU off or in pass-through on bare metal, see nvidia-smi topo -p2p r"
)

Pair = tuple[int, int]


class Tried(Struct, frozen=True):
    """What one ordered pair (owner, reader) came to; fields as in the probe's own answer."""

    ok: bool
    reason: str
    gb_per_s: float


RunProbe = Callable[[Sequence[Pair], Mapping[str, str], float], list[Tried]]


def pairs_of(num_gpus: int) -> list[Pair]:
    """Every ordered pair; of a single GPU the pair with itself, as two workers on it would be."""
    pairs = [(a, b) for a in range(num_gpus) for b in range(num_gpus) if a != b]
    return pairs or [(0, 0)]


def probe_peers(
    gpus: Sequence[Gpu], environ: Mapping[str, str], run: RunProbe | None = None
) -> Finding:
    """Try all pairs of the GPUs that a server would use."""
    if not gpus:
        return ok(CHECK, "no GPU; workers on CPU share memory")
    if any(gpu.is_slice for gpu in gpus):
        return ok(CHECK, "MIG slices cannot read each other: KV blocks go through host memory")
    pairs = pairs_of(len(gpus))
    child_environ = {**environ, VARIABLE: ",".join(gpu.uuid for gpu in gpus)}
    tried = dict(_try(pairs, child_environ, run or run_probe))
    return judge([tried[pair] for pair in pairs], pairs, [gpu.name for gpu in gpus])


def judge(tried: Sequence[Tried], pairs: Sequence[Pair], labels: Sequence[str]) -> Finding:
    """The line, and the matrix below it where there is more than one GPU."""
    good = [result.gb_per_s for result in tried if result.ok]
    if pairs == [(0, 0)]:
        if good:
            return ok(CHECK, f"two processes share GPU {labels[0]}'s memory, {good[0]:.0f} GB/s")
        words = f"two processes cannot share GPU {labels[0]}'s memory: {tried[0].reason}"
        return warning(CHECK, words, "matters for two workers on one GPU only: host memory then")
    rows = "\n".join(matrix(tried, pairs, labels))
    if len(good) == len(pairs):
        speed = f"{min(good):.0f} to {max(good):.0f} GB/s"
        return ok(CHECK, f"every GPU reads every other's memory, {speed}\n{rows}")
    reasons = {
        result.reason: f"GPU {labels[reader]} cannot read GPU {labels[owner]}: {result.reason}"
        for (owner, reader), result in reversed(list(zip(pairs, tried, strict=True)))
        if not result.ok
    }
    words = f"{len(good)} of {len(pairs)} directions work; " + "; ".join(reversed(reasons.values()))
    return warning(CHECK, f"{words}\n{rows}", _ADVICE_PARTLY if good else _ADVICE_NONE)


def matrix(tried: Sequence[Tried], pairs: Sequence[Pair], labels: Sequence[str]) -> Iterator[str]:
    """Lines of a table: a row per owner, a column per reader, GB/s or "no"."""
    cells = {
        pair: f"{result.gb_per_s:.0f}" if result.ok else "no"
        for pair, result in zip(pairs, tried, strict=True)
    }
    width = max(4, *(len(label) for label in labels), *(len(cell) for cell in cells.values())) + 2
    head = "GB/s, owner \\ reader"
    yield head + "".join(f"{label:>{width}}" for label in labels)
    for owner, label in enumerate(labels):
        row = (cells.get((owner, reader), "-") for reader in range(len(labels)))
        yield f"{label:>{len(head)}}" + "".join(f"{cell:>{width}}" for cell in row)


def _try(
    pairs: Sequence[Pair], environ: Mapping[str, str], run: RunProbe
) -> Iterator[tuple[Pair, Tried]]:
    """All pairs at once, and owner by owner where one of them took the whole probe down."""
    deadline_s = time.monotonic() + PROBE_TIMEOUT_S
    tried = run(pairs, environ, PROBE_TIMEOUT_S)
    if len(pairs) == 1 or not all(result.reason.startswith(_DIED) for result in tried):
        yield from zip(pairs, tried, strict=True)
        return
    for owner in sorted({owner for owner, _ in pairs}):
        some = [pair for pair in pairs if pair[0] == owner]
        left_s = deadline_s - time.monotonic()
        again = run(some, environ, left_s) if left_s > 0 else tried[: len(some)]
        yield from zip(some, again, strict=True)


def run_probe(pairs: Sequence[Pair], environ: Mapping[str, str], timeout_s: float) -> list[Tried]:
    """Run the workers' own probe on these (owner, reader) ordinals."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tinfer.worker.kv.probe", "owner"],
            input=msgspec.json.encode(list(pairs)),
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env=dict(environ),
        )
    except subprocess.TimeoutExpired:
        return [Tried(False, f"the probe took more than {timeout_s:.0f} s", 0.0)] * len(pairs)
    if done.returncode != 0:
        last = "".join(done.stderr.decode(errors="replace").strip().splitlines()[-1:])
        reason = f"the probe ended with {done.returncode}: {last or 'no message'}"
        return [Tried(False, reason, 0.0)] * len(pairs)
    return msgspec.json.decode(done.stdout, type=list[Tried])
