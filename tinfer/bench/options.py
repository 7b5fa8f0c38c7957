"""What `tinfer bench serve` was asked for, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from tinfer.bench.metrics import METRICS
from tinfer.bench.slo import Slo

# Source of the defaults of vLLM's names: vLLM 0.32, `vllm bench serve`.
DEFAULT_METRICS = ("ttft", "tpot", "itl", "e2el", "ttft_from_arrival", "e2el_from_arrival")
RANDOM = "random"
RANDOM_DEFAULTS: dict[str, float] = {
    "input_len": 1024,
    "output_len": 128,
    "request_rate": math.inf,
    "burstiness": 1.0,
}
# Fields and flags that only "random" knows, and those that only the other workloads know.
RANDOM_ONLY = {"input_len": "--input-len", "output_len": "--output-len"}
NEVER_RANDOM = {
    "length_scale": "--length-scale",
    "max_prompt_tokens": "--max-prompt-tokens",
    "max_output_tokens": "--max-output-tokens",
    "workload_options": "--workload-option",
}


class BenchOptions(Struct, frozen=True, kw_only=True):
    """Options of one run, by their flags' names.

    `trace` None asks for traces where the server is tinfer. `workload` "random" draws prompts of
    `input_len` tokens and asks for `output_len`; other workloads have lengths of their own, which
    `length_scale` multiplies and the `max_*` cut. `request_rate` and `burstiness` None are the
    workload's own; "random" has none and needs all of `RANDOM_DEFAULTS`. Another `salt` gives other
    prompts of the same shape. `wait_for_turns` holds a later turn of a session back until the one
    before is answered, and so closes the loop within sessions.
    """

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = "/v1/completions"
    model: str | None = None
    workload: str = RANDOM
    input_len: int | None = None
    output_len: int | None = None
    length_scale: float | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    workload_options: Mapping[str, float] = {}
    num_prompts: int = 1000
    seed: int = 0
    salt: str = ""
    request_rate: float | None = None
    burstiness: float | None = None
    max_concurrency: int | None = None
    wait_for_turns: bool = False
    num_warmups: int = 0
    ready_timeout_s: float = 0.0
    metrics: tuple[str, ...] = DEFAULT_METRICS
    percentiles: tuple[float, ...] = (99.0,)
    slo: Slo | None = None
    trace: bool | None = None
    temperature: float | None = None
    vocab_size: int | None = None
    headers: Mapping[str, str] = {}
    label: str | None = None
    save_detailed: bool = False
    json_path: str | None = None
    plot_dir: Path | None = None
    show_progress: bool = False


def parse_metrics(text: str) -> tuple[str, ...]:
    """Comma-separated names of metrics. Raises `ValueError` for an unknown one."""
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for name in names:
        if name not in METRICS:
            raise ValueError(f"{name!r} is none of {', '.join(METRICS)}")
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Comma-separated numbers from 0 to 100. Raises `ValueError`."""
    values = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            raise ValueError(f"{word!r} is no percentile")
        values.append(value)
    return tuple(dict.fromkeys(values))


def parse_headers(pairs: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` pairs. Raises `ValueError`."""
    headers = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{pair!r} is not NAME=VALUE")
        headers[name.strip()] = value.strip()
    return headers
