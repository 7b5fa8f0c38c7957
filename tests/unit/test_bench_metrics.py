"""Figures of outcomes written by hand, compared with what was worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinfer.bench.metrics import METRICS, figures_of
from tinfer.bench.outcome import LoadRun, Outcome
from tinfer.bench.report import WIDTH, table, warnings
from tinfer.bench.slo import Slo, parse_slo

ALL = tuple(METRICS)


def answered(
    request_id: str, sent_s: float, *chunk_s: float, tokens: int | None = None, **more: Any
) -> Outcome:
    """A whole answer, due when it was sent unless `more` says otherwise."""
    fields: dict[str, Any] = {
        "due_s": sent_s,
        "prompt_tokens": 10,
        "asked_tokens": len(chunk_s),
        "end_s": chunk_s[-1],
        "status": 200,
        "has_usage": True,
        "output_tokens": len(chunk_s) if tokens is None else tokens,
    }
    return Outcome(
        request_id=request_id, sent_s=sent_s, chunk_s=list(chunk_s), **{**fields, **more}
    )


def failed(request_id: str, status: int | None, error: str, **more: Any) -> Outcome:
    return Outcome(
        request_id=request_id,
        due_s=0.0,
        prompt_tokens=10,
        asked_tokens=4,
        status=status,
        error=error,
        **more,
    )


# Sent at 0: first token after 0.1 s, then gaps of 0.1, 0.2, 0.3. Sent at 1: one token after 0.4 s.
FOUR = answered("four", 0.0, 0.1, 0.2, 0.4, 0.7)
ONE = answered("one", 1.0, 1.4)


def run_of(*outcomes: Outcome, **more: Any) -> LoadRun:
    return LoadRun(outcomes=list(outcomes), **{"duration_s": 2.0, "cpu_s": 0.5, **more})


def figures(*outcomes: Outcome, slo: Slo | None = None, **more: Any) -> dict[str, Any]:
    return figures_of(run_of(*outcomes, **more), ALL, (50.0, 99.0), slo)


def test_latencies_of_two_answers() -> None:
    found = figures(FOUR, ONE)
    expected = {
        "mean_ttft_ms": 250.0,
        "median_ttft_ms": 250.0,
        "std_ttft_ms": 150.0,
        "p99_ttft_ms": 397.0,
        "mean_e2el_ms": 550.0,
        # (700 - 100) / 3; the answer of one token has none.
        "mean_tpot_ms": 200.0,
        "std_tpot_ms": 0.0,
        "p99_tpot_ms": 200.0,
        "mean_itl_ms": 200.0,
        "median_itl_ms": 200.0,
        "p99_itl_ms": 298.0,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_counts_and_throughputs() -> None:
    found = figures(FOUR, ONE)
    expected = {
        "duration": 2.0,
        "completed": 2,
        "failed": 0,
        "total_input_tokens": 20,
        "total_output_tokens": 5,
        "request_throughput": 1.0,
        "output_throughput": 2.5,
        "total_token_throughput": 12.5,
        "client_cpu_share": 0.25,
        "request_goodput": None,
        "total_cached_tokens": None,
        "status_counts": {"200": 2},
        "error_counts": {},
    }
    assert {key: found[key] for key in expected} == expected


def test_several_tokens_in_a_chunk_are_one_gap_and_all_counted() -> None:
    found = figures(answered("a", 0.0, 0.1, 0.5, tokens=9))
    assert found["mean_itl_ms"] == pytest.approx(400.0)
    assert found["mean_tpot_ms"] == pytest.approx(50.0)
    assert found["total_output_tokens"] == 9
    assert found["max_output_tokens_per_s"] == 2.0


def test_an_answer_of_one_token_alone_has_no_tpot_and_no_gap() -> None:
    found = figures(ONE)
    assert found["mean_ttft_ms"] == pytest.approx(400.0)
    assert found["mean_tpot_ms"] is found["p99_itl_ms"] is None


def test_what_failed_is_counted_and_in_no_latency() -> None:
    found = figures(
        FOUR,
        failed("a", 429, "slow down"),
        failed("b", 429, "slow down"),
        failed("c", None, "ClientOSError: reset"),
        failed("d", 200, "the engine broke", sent_s=0.0, chunk_s=[9.0]),
        Outcome(request_id="e", due_s=0.0, prompt_tokens=1, asked_tokens=1, interrupted=True),
        interrupted=True,
        num_not_sent=3,
    )
    assert (found["completed"], found["failed"]) == (1, 4)
    assert (found["num_interrupted"], found["num_not_sent"]) == (1, 3)
    assert found["error_counts"] == {
        "slow down": 2,
        "ClientOSError: reset": 1,
        "the engine broke": 1,
    }
    assert found["status_counts"] == {"429": 2, "200": 2}
    assert found["mean_ttft_ms"] == pytest.approx(100.0)
    assert found["total_output_tokens"] == 4


def test_a_run_without_an_answer_has_no_latency_rather_than_none_at_all() -> None:
    for found in (figures(), figures(failed("a", 500, "no"))):
        assert found["completed"] == 0
        assert found["request_throughput"] == 0.0
        assert {found[f"{word}_{m}_ms"] for word in ("mean", "std", "p99") for m in ALL} == {None}
        assert found["max_concurrent_requests"] is None
    assert figures()["client_lag_p99_ms"] is None
    assert figures(duration_s=0.0)["request_throughput"] is None


def test_short_answers_and_answers_without_usage_are_told_apart() -> None:
    found = figures(
        FOUR,
        answered("short", 0.0, 0.1, asked_tokens=5),
        answered("silent", 0.0, 0.1, has_usage=False),
    )
    assert (found["num_short_answers"], found["num_without_usage"]) == (1, 1)


def test_cached_tokens_are_added_where_the_server_says_them() -> None:
    assert figures(FOUR, answered("a", 0.0, 0.1, cached_tokens=7))["total_cached_tokens"] == 7


def test_waiting_is_the_queues_or_the_clients_own_fault() -> None:
    late = answered("late", 1.0, 1.5, 1.7, due_s=0.4, queue_s=0.5)
    found = figures(late)
    expected = {
        "mean_ttft_ms": 500.0,
        "mean_ttft_from_arrival_ms": 1100.0,
        "mean_e2el_ms": 700.0,
        "mean_e2el_from_arrival_ms": 1300.0,
        "mean_client_queue_time_ms": 500.0,
        "mean_e2el_including_client_queue_ms": 1200.0,
        "client_lag_p50_ms": 100.0,
        "client_lag_max_ms": 100.0,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_peaks_are_by_second_from_the_first_sending() -> None:
    # Seconds from 5.0: a is in 0 and 1, b in 1, c in 3.
    a = answered("a", 5.0, 5.5, 6.2)
    b = answered("b", 6.1, 6.3, 6.4, 6.5)
    c = answered("c", 8.0, 8.1)
    found = figures(a, b, c)
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (4.0, 2)


@pytest.mark.parametrize("percentile", [0.0, 12.5, 50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentiles_interpolate_linearly(percentile: float) -> None:
    rng = np.random.default_rng(1)
    ttfts_s = rng.exponential(size=37)
    outcomes = [answered(str(i), 0.0, float(ttft_s)) for i, ttft_s in enumerate(ttfts_s)]
    found = figures_of(run_of(*outcomes), ("ttft",), (percentile,), None)
    ordered = sorted(ttfts_s)
    place = percentile / 100 * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    by_hand = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    assert found[f"p{percentile:g}_ttft_ms"] == pytest.approx(1000 * by_hand)
    assert found[f"p{percentile:g}_ttft_ms"] == pytest.approx(
        1000 * np.percentile(ttfts_s, percentile, method="linear")
    )


@pytest.mark.parametrize(
    ("pairs", "num_good"),
    [
        (["ttft:100"], 1),
        (["ttft:99"], 0),
        (["ttft:400"], 2),
        (["ttft:400", "tpot:199"], 1),
        (["tpot:200"], 2),
        (["tpot:0"], 1),
        (["e2el:500"], 1),
        (["e2el:700", "tpot:200", "ttft:400"], 2),
    ],
)
def test_goodput_is_what_meets_every_bound(pairs: list[str], num_good: int) -> None:
    # 4 ms of slack for what binary fractions make of 0.7 - 0.1.
    slo = parse_slo(pairs)
    assert slo is not None
    nudged = [nudge(outcome) for outcome in (FOUR, ONE, failed("x", 200, "cut", chunk_s=[0.1]))]
    found = figures(*nudged, slo=slo)
    assert found["request_goodput"] == num_good / 2.0


def nudge(outcome: Outcome) -> Outcome:
    """A hair earlier, so that a bound that is met exactly in decimal is met in binary too."""
    chunk_s = [at_s - 1e-9 * (i + 1) for i, at_s in enumerate(outcome.chunk_s)]
    return Outcome(
        **{f: getattr(outcome, f) for f in outcome.__struct_fields__} | {"chunk_s": chunk_s}
    )


def test_goodput_from_arrival_counts_the_wait() -> None:
    late = answered("late", 1.0, 1.1, 1.2, due_s=0.0, queue_s=1.0)
    found = figures(late, slo=Slo(ttft=500))
    assert (found["request_goodput"], found["request_goodput_from_arrival"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("pairs", "word"),
    [
        (["itl:5"], "itl:5"),
        (["ttft"], "ttft"),
        (["ttft:fast"], "ttft:fast"),
        (["ttft:-1"], "ttft:-1"),
        (["ttft:nan"], "ttft:nan"),
        (["ttft:1", "ttft:2"], "two bounds"),
    ],
)
def test_a_bad_slo_is_refused(pairs: list[str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_slo(pairs)


def test_no_pair_is_no_slo() -> None:
    assert parse_slo([]) is None
    assert parse_slo(["e2el:5", "ttft:1.5"]) == Slo(e2el=5.0, ttft=1.5)


def result(*outcomes: Outcome, **more: Any) -> dict[str, Any]:
    return {"request_rate": "inf", "max_concurrency": None, **figures(*outcomes), **more}


def test_the_table_has_vllms_rows_at_vllms_width() -> None:
    lines = list(table(result(FOUR, ONE), ("ttft", "tpot"), (50.0, 99.0)))
    assert lines[0] == " Serving Benchmark Result ".center(WIDTH, "=")
    assert "Successful requests:                     2         " in lines
    assert "Request throughput (req/s):              1.00      " in lines
    assert "Mean TTFT (ms):                          250.00    " in lines
    assert "P99 TPOT (ms):                           200.00    " in lines
    assert lines[-1] == "=" * WIDTH
    text = "\n".join(lines)
    assert "ITL" not in text and "Request rate" not in text and "Errors" not in text
    assert "Interrupted" not in text


def test_the_table_tells_what_went_wrong() -> None:
    outcomes = [failed(str(i), 500, f"error {i:02}") for i in range(12)]
    told = result(*outcomes, interrupted=True, request_rate=2.5, num_not_sent=4)
    lines = list(table(told, ("ttft",), (99.0,)))
    assert "(interrupted)" in lines[0]
    assert "Failed requests:                         12        " in lines
    assert "Requests never sent:                     4         " in lines
    assert "Request rate configured (RPS):           2.50      " in lines
    assert "Mean TTFT (ms):                          -         " in lines
    assert "     1 x error 09" in lines
    assert any(line.startswith("     2 x other errors") for line in lines)


def test_warnings_are_for_what_makes_figures_doubtful() -> None:
    assert list(warnings(result(FOUR, ONE))) == []
    busy = result(FOUR, client_cpu_share=0.81, client_lag_p99_ms=5.1)
    assert [line.split()[2] for line in warnings(busy)] == ["generator", "sent"]
    poor = result(failed("a", 500, "no"), answered("b", 0.0, 0.1, asked_tokens=2))
    assert list(warnings(poor)) == [
        "1 requests failed and are in no latency",
        "1 answers are shorter than asked for",
    ]
    assert list(warnings(result())) == []
