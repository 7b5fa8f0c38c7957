"""The servers of each arm: command lines as data, nothing is started.

Engine stand-ins make `rate` tokens/s together whatever the number of streams: a step takes time per
sequence alone. One server of two workers stands for both of a master's: on the route whole both
emit, on the route split one does. `tinfer` and vLLM compute the built-in model on one engine of one
thread, at the speed that it has, with the same settings.
"""

from __future__ import annotations

import sys
from typing import Literal

from tinfer.bench.compare.arms import SERVED_NAME, ServerPlan
from tinfer.bench.frontend.options import PACED, VLLM, FrontendOptions, Kind
from tinfer.tiny_model import MODEL_DIR

# paced: `rate` tokens/s. full: as fast as it goes. unloaded: a step takes as long as a real one.
Mode = Literal["paced", "full", "unloaded"]
UNLOADED_STEP_S = 0.020
MAX_MODEL_LEN = 32_768
KV_BYTES = 2 << 30
NUM_FAKE_BLOCKS = 1 << 17
_NUM_EMITTING = {"master-whole": 2, "master-split": 1, "relay": 2}


def modes_of(kind: Kind) -> tuple[Mode, ...]:
    """How its engines can be run."""
    return ("paced", "full", "unloaded") if kind in PACED else ("full",)


def server_of(kind: Kind, mode: Mode, options: FrontendOptions) -> ServerPlan:
    """What has to run."""
    if kind == "relay":
        step_s, seq_s = pace_of(kind, mode, options.rate)
        argv = [sys.executable, "-m", "tinfer.bench.frontend.relay"]
        argv += ["--step-s", repr(step_s), "--seq-s", repr(seq_s)]
        return ServerPlan(argv=tuple(argv), environment={}, devices=(0, 1))
    if kind in VLLM:
        return _vllm(kind, options)
    argv = [sys.executable, "-m", "tinfer", "serve", "--host", "127.0.0.1", *_equal(options)]
    if kind == "tinfer":
        argv += ["--prefill", "1", "--decode", "0", "--cpu-threads", "1"]
        argv += ["--kv-cache-memory-bytes", str(KV_BYTES), "--enforce-eager"]
        return ServerPlan(argv=tuple(argv), environment={}, devices=(0,))
    step_s, seq_s = pace_of(kind, mode, options.rate)
    argv += ["--engine", "fake", "--route", kind.removeprefix("master-")]
    argv += ["--max-num-batched-tokens", str(MAX_MODEL_LEN)]
    for name, value in (
        ("step_s", step_s),
        ("decode_seq_s", seq_s),
        ("steady", 1),
        ("num_blocks", NUM_FAKE_BLOCKS),
    ):
        argv += ["--fake-engine", f"{name}={value!r}"]
    return ServerPlan(argv=tuple(argv), environment={}, devices=(0, 1))


def pace_of(kind: Kind, mode: Mode, rate: float) -> tuple[float, float]:
    """Seconds that a step takes, and those per sequence in it."""
    if mode == "unloaded":
        return UNLOADED_STEP_S, 0.0
    return 0.0, (_NUM_EMITTING[kind] / rate if mode == "paced" else 0.0)


def _vllm(kind: Kind, options: FrontendOptions) -> ServerPlan:
    argv = [*options.vllm_command, "serve", str(MODEL_DIR), "--host", "127.0.0.1"]
    argv += [*_equal(options), "--kv-cache-memory-bytes", str(KV_BYTES), "--enforce-eager"]
    argv += ["--api-server-count", kind.removeprefix("vllm-")]
    # tinfer logs neither.
    argv += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    environment = {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    return ServerPlan(argv=tuple(argv), environment=environment, devices=(0,))


def _equal(options: FrontendOptions) -> list[str]:
    """What `tinfer serve` and `vllm serve` spell alike."""
    num_seqs = max(options.streams)
    return [
        *("--served-model-name", SERVED_NAME, "--max-num-seqs", str(num_seqs)),
        *("--max-model-len", str(MAX_MODEL_LEN)),
    ]
