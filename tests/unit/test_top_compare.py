"""What `tinfer top` makes of two scrapes, taken of the metrics that the server really shows."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

from tests.unit.master_box import P
from tests.unit.metrics_box import MODEL, READY, MeteredBox
from tests.unit.top_box import LEDGER, STATE, URL, scraped, waiting
from tinfer import __version__
from tinfer.client.errors import (
    ApiError,
    ConnectionFailed,
    Overloaded,
    RequestTimeout,
    ServerUnavailable,
    TinferClientError,
    Unauthorized,
    UnexpectedAnswer,
)
from tinfer.errors import StartError
from tinfer.master.supervisor import Life
from tinfer.top.app import Watch, may_pass
from tinfer.top.change import Buckets, Change
from tinfer.top.compare import view_of
from tinfer.top.scrape import Metrics, scrape_of
from tinfer.wire import messages as wire

NOTHING = {"num": 0, "mean_s": None, "p50_s": None, "p99_s": None}


@pytest.fixture
def box() -> MeteredBox:
    return MeteredBox()


def busy(box: MeteredBox) -> None:
    """Two seconds of a server: what they leave in its counts."""
    tally = box.dispatcher.tally
    tally.num_accepted += 6
    tally.ended.update(stop=3, length=1, abort=2)
    tally.output_tokens += 500
    tally.prompt_tokens += 3000
    tally.handoffs.update(installed=3, recomputed=1)
    tally.handoff_bytes += 8000
    for copy_s in (0.001, 0.002, 0.003):
        tally.handoff_copy.observe(copy_s)
    for ttft_s in (0.03, 0.03, 0.05, 0.2):
        tally.ttft.observe(ttft_s)
    tally.lengths.update(within=3, above=1)
    for error in (4, 4, 4, 8):
        tally.length_error.observe(error)


# --- from two scrapes ----------------------------------------------------------------------------


async def test_rates_and_times_of_the_interval(box: MeteredBox) -> None:
    busy(box)
    before = await scraped(box, 10.0)
    busy(box)
    view = view_of(URL, before, await scraped(box, 12.0), 5)
    assert (view.interval_s, view.was_restarted) == (2.0, False)
    assert (view.model, view.version, view.url) == (MODEL, __version__, URL)
    assert (view.is_healthy, view.status) == (True, "ok")
    requests = view.requests
    assert (requests.accepted_per_s, requests.answered_per_s) == (3.0, 2.0)
    assert (requests.num_accepted, requests.num_answered, requests.num_aborted) == (12, 8, 4)
    assert (view.output_tokens_per_s, view.prompt_tokens_per_s) == (250.0, 1500.0)
    ttft = view.ttft
    assert ttft.num == 4 and ttft.mean_s == pytest.approx(0.31 / 4)
    # Of four values the second is the last of the bucket up to 40 ms, the others lie above.
    assert ttft.p50_s == pytest.approx(0.04)
    assert ttft.p99_s == pytest.approx(0.1 + 0.15 * 0.96)
    assert msgspec.structs.asdict(view.itl) == NOTHING
    handoffs = view.handoffs
    assert (handoffs.per_s, handoffs.bytes_per_s, handoffs.num_recomputed) == (2.0, 4000.0, 2)
    assert handoffs.mean_copy_s == pytest.approx(0.002)
    assert (view.lengths.num, view.lengths.within_share) == (4, 0.75)
    assert (view.lengths.mean_error_tokens, view.lengths_so_far.num) == (5.0, 8)


async def test_nothing_happened(box: MeteredBox) -> None:
    busy(box)
    before = await scraped(box, 10.0)
    view = view_of(URL, before, await scraped(box, 11.0), 5)
    assert (view.requests.accepted_per_s, view.output_tokens_per_s) == (0.0, 0.0)
    assert msgspec.structs.asdict(view.ttft) == NOTHING
    assert (view.handoffs.per_s, view.handoffs.mean_copy_s) == (0.0, None)
    assert msgspec.structs.asdict(view.lengths) == {
        "num": 0,
        "within_share": None,
        "mean_error_tokens": None,
    }
    assert view.lengths_so_far.within_share == 0.75


async def test_one_scrape_has_no_rates(box: MeteredBox) -> None:
    busy(box)
    view = view_of(URL, None, await scraped(box, 10.0), 5)
    assert (view.interval_s, view.was_restarted) == (None, False)
    assert (view.output_tokens_per_s, view.requests.answered_per_s) == (None, None)
    assert (view.handoffs.per_s, view.workers[0].busy_share) == (None, None)
    assert msgspec.structs.asdict(view.ttft) == NOTHING
    assert view.requests.num_accepted == 6


async def test_a_new_server_counts_from_zero(box: MeteredBox) -> None:
    """Also where it has counted more by now than the old one had."""
    busy(box)
    before = await scraped(box, 10.0, started_s=1000.0)
    new = MeteredBox()
    busy(new)
    busy(new)
    view = view_of(URL, before, await scraped(new, 14.0, started_s=2000.0), 5)
    assert view.was_restarted
    assert (view.requests.accepted_per_s, view.output_tokens_per_s) == (3.0, 250.0)
    assert view.ttft.num == 8
    assert view.uptime_s == 1_000_014.0 - 2000.0


async def test_counters_that_fall_make_no_negative_rates(box: MeteredBox) -> None:
    """Where the system does not say when the process began, they alone tell of another server."""
    for _ in range(3):
        busy(box)
    before = await scraped(box, 10.0, started_s=1000.0)
    new = MeteredBox()
    busy(new)
    view = view_of(URL, before, await scraped(new, 12.0, started_s=1000.0), 5)
    assert not view.was_restarted
    assert (view.requests.accepted_per_s, view.output_tokens_per_s) == (3.0, 250.0)
    assert view.ttft.num == 4 and view.ttft.mean_s == pytest.approx(0.31 / 4)
    view = view_of(URL, before, await scraped(MeteredBox(), 12.0, started_s=1000.0), 5)
    assert (view.requests.accepted_per_s, view.output_tokens_per_s) == (0.0, 0.0)
    assert msgspec.structs.asdict(view.ttft) == NOTHING


async def test_refusals_and_failures_are_told_by_reason(box: MeteredBox) -> None:
    box.dispatcher.tally.refuse("slo")
    box.dispatcher.tally.refuse("queue-full", "max_num_queued_reqs")
    box.dispatcher.tally.refuse("queue-full", "max_num_queued_reqs")
    box.dispatcher.tally.failed_with("engine")
    requests = view_of(URL, None, await scraped(box, 1.0), 5).requests
    assert (requests.num_refused, requests.num_failed) == (3, 1)
    assert (requests.refused["slo"], requests.refused["queue-full"]) == (1, 2)
    assert requests.failed["engine"] == 1


async def test_workers(box: MeteredBox) -> None:
    num_used = READY.num_blocks // 4
    box.say(P, wire.Idle(wire.WorkerStats(num_used_blocks=num_used, busy_s=1.0)))
    before = await scraped(box, 10.0)
    stats = wire.WorkerStats(
        num_used_blocks=num_used, num_running=3, num_waiting=2, busy_s=1.5, num_preemptions=4
    )
    box.say(P, wire.Idle(stats))
    box.workers.deaths["p", "signal"] += 1
    box.workers.deaths["p", "hung"] += 1
    box.workers.slots["d"].life = Life.DEAD
    view = view_of(URL, before, await scraped(box, 12.0), 5)
    first, second = view.workers
    assert (first.id, first.role, first.device, first.state) == ("p", "prefill", "core 0", "ready")
    assert (first.num_running, first.num_waiting, first.num_preemptions) == (3, 2, 4)
    assert (first.kv_bytes, first.kv_share) == (READY.kv_bytes, num_used / READY.num_blocks)
    assert (first.busy_share, first.num_deaths) == (0.25, 2)
    assert first.outstanding_prefill_tokens == 0
    assert (second.kv_bytes, second.kv_used_bytes, second.kv_share) == (None, None, None)
    assert (second.busy_share, second.num_deaths) == (0.0, 0)


async def test_a_long_step_is_no_more_than_all_of_the_time(box: MeteredBox) -> None:
    before = await scraped(box, 10.0)
    box.say(P, wire.Idle(wire.WorkerStats(busy_s=7.0)))
    assert view_of(URL, before, await scraped(box, 11.0), 5).workers[0].busy_share == 1.0


@pytest.mark.parametrize(
    ("said", "generation", "shown"),
    [
        ("starting", 1, "starting"),
        ("starting", 2, "restarting"),
        ("draining", 2, "draining"),
        ("dead", 1, "dead"),
        ("given-up", 3, "given-up"),
    ],
)
async def test_the_state_of_a_worker(
    box: MeteredBox, said: str, generation: int, shown: str
) -> None:
    worker = {**STATE["workers"][0], "state": said, "generation": generation, "reason": "why"}
    view = view_of(URL, None, await scraped(box, 1.0, {**STATE, "workers": [worker]}), 5)
    (seen,) = view.workers
    assert (seen.state, seen.generation, seen.reason) == (shown, generation, "why")


async def test_the_first_that_wait(box: MeteredBox) -> None:
    told = [msgspec.to_builtins(waiting(request_id=f"r{place}")) for place in range(9)]
    told.append(msgspec.to_builtins(waiting(request_id="h", phase="handoff")))
    phases = {"queued": 100, "prefilling": 1, "handoff": 50, "decoding": 3}
    state = {**STATE, "waiting": told, "requests_by_phase": phases}
    scrape = await scraped(box, 1.0, state, {**LEDGER, "pulls": 2, "zombies": 1})
    view = view_of(URL, None, scrape, 2)
    assert view.waiting == [waiting(request_id="r0"), waiting(request_id="r1")]
    assert (view.num_waiting, view.requests_by_phase) == (101, phases)
    assert (view.handoffs.num_pulls, view.handoffs.num_zombies) == (2, 1)
    assert view_of(URL, None, scrape, 0).waiting == []


async def test_leases_by_state(box: MeteredBox) -> None:
    box.submit()
    box.prefilled()
    leases = view_of(URL, None, await scraped(box, 1.0), 5).handoffs.leases
    assert leases["reading"] == 1 and sum(leases.values()) == 1


@pytest.mark.parametrize(
    ("metrics", "state"),
    [
        ("", {}),
        ("", {"workers": None}),
        ("", {"workers": [{"id": "p"}]}),
        ("<html>", STATE),
        ("a b c d", STATE),
    ],
)
def test_another_server_is_one_line(metrics: str, state: dict[str, object]) -> None:
    with pytest.raises(StartError, match="no tinfer server, or one of another version") as caught:
        scrape_of(metrics, state, {}, 0.0, 0.0)
    assert "\n" not in str(caught.value)


# --- histograms ----------------------------------------------------------------------------------


def test_quantiles_lie_within_their_bucket() -> None:
    inf = float("inf")
    counted = Buckets((1.0, 2.0, 4.0, inf), (2, 0, 2, 0), 8.0)
    assert [counted.quantile(share) for share in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1.0, 3.0, 4.0]
    assert counted.mean == 2.0
    above = Buckets((1.0, inf), (1, 3), 50.0)
    assert (above.quantile(0.25), above.quantile(0.5), above.quantile(0.99)) == (1.0, 1.0, 1.0)
    none = Buckets((1.0, inf), (0, 0), 0.0)
    assert (none.quantile(0.5), none.mean) == (None, None)
    assert Buckets((), (), 0.0).quantile(0.5) is None


@given(
    before=st.lists(st.floats(0, 20), max_size=20),
    after=st.lists(st.floats(0, 20), min_size=1, max_size=20),
)
def test_a_quantile_is_in_the_bucket_of_the_value(before: list[float], after: list[float]) -> None:
    """Against the values themselves, through the text of the format."""
    bounds = (1.0, 2.0, 5.0, 10.0)
    registry = CollectorRegistry()
    histogram = Histogram("times", "Times.", buckets=bounds, registry=registry)
    for value in before:
        histogram.observe(value)
    early = Metrics(generate_latest(registry).decode())
    for value in after:
        histogram.observe(value)
    counted = Change(early, Metrics(generate_latest(registry).decode())).buckets("times")
    assert counted.num == len(after)
    assert counted.mean == pytest.approx(sum(after) / len(after), abs=1e-9)
    found = counted.quantile(0.5)
    assert found is not None
    median = sorted(after)[(len(after) + 1) // 2 - 1]
    upper = next((bound for bound in bounds if median <= bound), None)
    lower = max((bound for bound in bounds if bound < median), default=0.0)
    assert lower <= found <= (bounds[-1] if upper is None else upper)


# --- a server that comes and goes ----------------------------------------------------------------


async def test_what_was_seen_last_stays_while_the_server_is_gone(box: MeteredBox) -> None:
    watch = Watch(URL, 5)
    watch.lost("nothing answers", 1.0)
    assert (watch.sight.view, watch.sight.trouble, watch.sight.lost_s) == (
        None,
        "nothing answers",
        None,
    )
    seen = watch.saw(await scraped(box, 2.0))
    assert (watch.sight.view, watch.sight.trouble) == (seen, "")
    watch.lost("nothing answers", 5.0)
    assert (watch.sight.view, watch.sight.trouble, watch.sight.lost_s) == (
        seen,
        "nothing answers",
        3.0,
    )
    busy(box)
    view = watch.saw(await scraped(box, 8.0))
    assert (view.interval_s, view.output_tokens_per_s) == (6.0, 500 / 6)
    assert (watch.sight.view, watch.sight.trouble, watch.sight.lost_s) == (view, "", None)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionFailed("nothing answers"), True),
        (RequestTimeout("total"), True),
        (ServerUnavailable(503, "starting"), True),
        (ApiError(500, "broken"), True),
        (Overloaded(429, "later"), True),
        (Unauthorized(401, "a key"), False),
        (Unauthorized(403, "not from there"), False),
        (ApiError(418, "teapot"), False),
        (UnexpectedAnswer("what is no JSON"), False),
    ],
)
def test_what_is_worth_trying_on(error: TinferClientError, passes: bool) -> None:
    assert may_pass(error) is passes
