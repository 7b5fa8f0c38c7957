"""`tinfer bench serve` means by a figure what `vllm bench serve` means: both get the same run."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.serve import calculate_metrics

from tinfer.bench.metrics import figures_of, percentile_word
from tinfer.bench.outcome import LoadRun, Outcome
from tinfer.bench.slo import Slo

PERCENTILES = [50.0, 90.0, 99.0, 99.9]
LATENCIES = ("ttft", "tpot", "itl", "e2el")
DURATION_S = 31.0
SAME_NAME = (
    *("completed", "failed", "request_throughput", "request_goodput", "output_throughput"),
    *("total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests"),
)


def outcomes() -> list[Outcome]:
    """A run of 300 answers of 1 to 40 tokens, a tenth of which failed."""
    rng = random.Random(3)
    made = []
    for number in range(300):
        sent_s = rng.uniform(5.0, 25.0)
        num_tokens = rng.choice((1, 2, 7, 40))
        chunk_s = [sent_s + rng.random()]
        for _ in range(num_tokens - 1):
            chunk_s.append(chunk_s[-1] + rng.expovariate(20.0))
        made.append(
            Outcome(
                request_id=str(number),
                due_s=sent_s,
                sent_s=sent_s,
                prompt_tokens=rng.randint(1, 500),
                asked_tokens=num_tokens,
                chunk_s=chunk_s,
                end_s=chunk_s[-1],
                output_tokens=num_tokens,
                has_usage=True,
                error="refused" if rng.random() < 0.1 else None,
            )
        )
    return made


def as_vllm_has_it(one: Outcome) -> RequestFuncOutput:
    return RequestFuncOutput(
        success=one.ok,
        latency=one.e2el_s,
        output_tokens=one.output_tokens,
        ttft=one.ttft_s,
        itl=one.itls_s,
        prompt_len=one.prompt_tokens,
        start_time=one.sent_s,
        error=one.error or "",
    )


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, Any], Any]:
    """Our figures and vLLM's, of one and the same run."""
    made = outcomes()
    run = LoadRun(outcomes=made, duration_s=DURATION_S, cpu_s=1.0)
    ours = figures_of(run, list(LATENCIES), PERCENTILES, Slo(ttft=600, tpot=60))
    nothing: list[Any] = [None] * len(made)
    theirs, _ = calculate_metrics(
        input_requests=nothing,
        outputs=[as_vllm_has_it(one) for one in made],
        dur_s=DURATION_S,
        tokenizer=None,
        selected_percentiles=PERCENTILES,
        goodput_config_dict={"ttft": 600, "tpot": 60},
    )
    return ours, theirs


@pytest.mark.parametrize("name", SAME_NAME)
def test_counts_and_rates(both: tuple[dict[str, Any], Any], name: str) -> None:
    ours, theirs = both
    assert ours[name] == pytest.approx(getattr(theirs, name), rel=1e-9)


@pytest.mark.parametrize("latency", LATENCIES)
def test_latencies(both: tuple[dict[str, Any], Any], latency: str) -> None:
    ours, theirs = both
    for word in ("mean", "median", "std"):
        key = f"{word}_{latency}_ms"
        assert ours[key] == pytest.approx(getattr(theirs, key), rel=1e-9)
    for percent, value in getattr(theirs, f"percentiles_{latency}_ms"):
        key = f"p{percentile_word(percent)}_{latency}_ms"
        assert ours[key] == pytest.approx(value, rel=1e-9)


def test_tokens(both: tuple[dict[str, Any], Any]) -> None:
    ours, theirs = both
    assert ours["total_input_tokens"] == theirs.total_input
    assert ours["total_output_tokens"] == theirs.total_output
