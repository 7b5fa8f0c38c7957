"""What a scrape shows of the state of server and workers, and how the text is written."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.master_box import D, P
from tests.unit.metrics_box import READY, MeteredBox
from tinfer.api.exposition import exposition
from tinfer.core.lengths import Lengths
from tinfer.core.types import Role
from tinfer.master.lag import BOUNDS_S
from tinfer.master.metrics import histogram as buckets
from tinfer.master.metrics.catalogue import METRICS, VLLM
from tinfer.master.metrics.histogram import Histogram
from tinfer.master.supervisor import Life
from tinfer.sim.scores import quantiles
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation

BLOCK_BYTES = READY.kv_bytes / READY.num_blocks
OPENMETRICS = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"


@pytest.fixture
def box() -> MeteredBox:
    return MeteredBox()


async def test_phases_as_running_and_waiting(box: MeteredBox) -> None:
    def seen() -> tuple[float, ...]:
        reasons = ("capacity", "deferred")
        name = "vllm:num_requests_waiting_by_reason"
        return (
            box.value("vllm:num_requests_running"),
            box.value("vllm:num_requests_waiting"),
            *(box.value(name, reason=reason) for reason in reasons),
        )

    assert seen() == (0, 0, 0, 0)
    box.to_waiting()
    num_seats = box.capacity.max_num_seqs
    assert seen() == (0, num_seats + 1, 0, num_seats + 1)
    assert box.value("tinfer:requests", phase="handoff") == num_seats + 1
    for slot in range(1, num_seats + 1):
        box.pulled(f"f{slot}")
    assert seen() == (num_seats, 1, 0, 1)
    box.submit("long", num_prompt=2 * box.capacity.chunk_tokens)
    box.submit("behind")
    assert seen() == (num_seats + 1, 2, 1, 1)
    assert box.value("tinfer:pulls") == 0


async def test_leases_and_the_bytes_that_they_hold(box: MeteredBox) -> None:
    box.submit()
    box.prefilled()
    assert box.value("tinfer:leases", worker="p", state="reading") == 1
    assert box.value("tinfer:worker_kv_held_bytes", worker="p") == 2 * BLOCK_BYTES
    assert box.value("tinfer:pulls") == 1
    box.pulled()
    assert box.value("tinfer:leases", worker="p", state="read") == 1
    assert box.value("tinfer:pulls") == 0
    box.lease_ended(0)
    assert box.value("tinfer:leases", worker="p", state="read") == 0
    assert box.value("tinfer:worker_kv_held_bytes", worker="p") == 0


async def test_the_use_of_the_kv_cache(box: MeteredBox) -> None:
    num_used = READY.num_blocks // 2
    box.say(P, wire.Idle(wire.WorkerStats(num_used_blocks=num_used, num_running=3)))
    assert box.value("vllm:kv_cache_usage_perc") == num_used / (2 * READY.num_blocks)
    assert box.value("tinfer:worker_kv_used_bytes", worker="p") == num_used * BLOCK_BYTES
    assert box.value("tinfer:worker_kv_bytes", worker="p") == READY.kv_bytes
    assert box.value("tinfer:worker_requests", worker="p", state="running") == 3
    for slot in box.workers.slots.values():
        slot.life = Life.DEAD
    box.down(P)
    assert box.value("vllm:kv_cache_usage_perc") == 0


async def test_what_a_worker_has_done_outlasts_its_death(box: MeteredBox) -> None:
    first = wire.WorkerStats(num_steps=5, num_preemptions=2, num_pulls=4, num_failed_pulls=1)
    box.say(D, wire.Idle(first))
    box.down(D)
    assert box.value("tinfer:worker_steps_total", worker="d") == 5
    again = Incarnation("d", 1)
    box.workers.slots["d"].generation = 1
    box.up(again)
    box.say(again, wire.Idle(wire.WorkerStats(num_steps=3, num_preemptions=1, num_pulls=1)))
    assert box.value("tinfer:worker_steps_total", worker="d") == 8
    assert box.value("tinfer:worker_pulls_total", worker="d", outcome="copied") == 4
    assert box.value("tinfer:worker_pulls_total", worker="d", outcome="failed") == 1
    assert box.value("vllm:num_preemptions_total") == 3
    assert box.value("tinfer:worker_generation", worker="d") == 1


async def test_who_is_up_and_who_died_of_what(box: MeteredBox) -> None:
    assert (box.value("tinfer:workers"), box.value("tinfer:workers_up")) == (2, 2)
    slot = box.workers.slots["d"]
    slot.life, slot.num_restarts = Life.DEAD, 1
    box.workers.deaths["d", "signal"] += 2
    assert (box.value("tinfer:workers"), box.value("tinfer:workers_up")) == (2, 1)
    assert box.value("tinfer:worker_up", worker="d") == 0
    assert box.value("tinfer:worker_deaths_total", worker="d", cause="signal") == 2
    assert box.value("tinfer:worker_deaths_total", worker="p", cause="signal") == 0
    assert box.value("tinfer:worker_restarts_total", worker="d") == 1
    labels = {"worker": "d", "role": "decode", "state": "dead", "device": slot.placement.label}
    assert box.value("tinfer:worker_info", **labels) == 1
    box.is_healthy = False
    assert box.value("tinfer:healthy") == 0


async def test_roles_that_changed() -> None:
    box = MeteredBox(roles="p d d1")
    box.dispatcher.ask_role(D, Role.PREFILL)
    assert box.value("tinfer:role_changes_total", worker="d", role="prefill") == 1
    device = box.workers.slots["d"].placement.label
    labels = {"worker": "d", "role": "prefill", "state": "ready", "device": device}
    assert box.value("tinfer:worker_info", **labels) == 1


async def test_the_lag_of_the_loop(box: MeteredBox) -> None:
    for lag_s in (-0.001, 0.5 * BOUNDS_S[0], 2 * BOUNDS_S[-1]):
        box.lag.add(lag_s)
    assert box.histogram("tinfer:loop_lag_seconds") == (3, 0.5 * BOUNDS_S[0] + 2 * BOUNDS_S[-1])
    assert box.within("tinfer:loop_lag_seconds", str(BOUNDS_S[0])) == 2


# --- as vLLM has them ----------------------------------------------------------------------------


def vllm_source(name: str) -> Path:
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "v1" / "metrics" / name


def made_by_vllm() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Name, type and labels of each metric that its Prometheus logger makes."""
    for node in ast.walk(ast.parse(vllm_source("loggers.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("_cls"):
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            labels = said.get("labelnames", "").replace("labelnames", "'model_name', 'engine'")
            kind = ast.unparse(node.func).removeprefix("self._").removesuffix("_cls")
            yield said.get("name", "").strip("'"), kind, tuple(re.findall(r"'(\w+)'", labels))


def test_names_types_and_labels_are_those_of_vllm() -> None:
    ours = {
        (metric.full_name, metric.kind, metric.all_labels)
        for metric in METRICS
        if metric.namespace == VLLM
    }
    assert ours - set(made_by_vllm()) == set()


def test_buckets_are_those_of_vllm() -> None:
    theirs: dict[str, Any] = runpy.run_path(str(vllm_source("buckets.py")))
    assert theirs["TIME_TO_FIRST_TOKEN_BUCKETS"] == buckets.TTFT_S
    assert theirs["INTER_TOKEN_LATENCY_BUCKETS"] == buckets.ITL_S
    assert theirs["REQUEST_LATENCY_BUCKETS"] == buckets.LATENCY_S
    assert theirs["REQUEST_PARAMS_N_BUCKETS"] == buckets.NUM_ANSWERS
    assert theirs["REQUEST_NUM_PREEMPTIONS_BUCKETS"] == buckets.NUM_PREEMPTIONS
    for longest in (1, 100, 1234, 32768, 1_000_000):
        cut = Histogram(buckets.TOKENS).now().up_to(longest)
        assert cut.bounds == theirs["build_1_2_5_buckets"](longest)


# --- the text ------------------------------------------------------------------------------------


async def test_both_formats_are_what_their_parsers_take(box: MeteredBox) -> None:
    box.submit()
    box.prefilled()
    text, kind = await exposition(box.registry, "")
    assert kind.startswith("text/plain")
    plain = {one.name: one for one in text_string_to_metric_families(text.decode())}
    text, kind = await exposition(box.registry, OPENMETRICS)
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"\n# EOF\n") and text.count(b"# EOF") == 1
    opened = {one.name: one for one in openmetrics_families(text.decode())}  # type: ignore[no-untyped-call]
    families = {one.name: one.type for one in box.registry.collect()}
    # Every series under its own name: the colon is a part of it.
    assert {name.partition(":")[0] for name in opened} >= {"vllm", "tinfer"}
    for parsed in (plain, opened):
        assert {name: one.type for name, one in parsed.items()} == families
        (accepted,) = parsed["tinfer:requests_accepted"].samples
        assert (accepted.name, accepted.value) == ("tinfer:requests_accepted_total", 1)


async def test_single_series_can_be_asked_for(box: MeteredBox) -> None:
    text, _ = await exposition(box.registry, "", ["tinfer:workers", "tinfer:no_such_thing"])
    (family,) = text_string_to_metric_families(text.decode())
    assert (family.name, family.samples[0].value) == ("tinfer:workers", 2)


async def test_a_scrape_lets_others_move_and_shows_one_moment(box: MeteredBox) -> None:
    num_turns = 0

    async def others() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            box.submit(f"r{num_turns}")
            await asyncio.sleep(0)

    moving = asyncio.create_task(others())
    await asyncio.sleep(0)
    before = num_turns
    text, _ = await exposition(box.registry, "")
    moving.cancel()
    assert num_turns - before >= len(METRICS)
    seen = {one.name: one for one in text_string_to_metric_families(text.decode())}
    open_requests = sum(one.value for one in seen["tinfer:requests"].samples)
    (accepted,) = seen["tinfer:requests_accepted"].samples
    assert open_requests == accepted.value


@given(
    points=st.lists(st.integers(1, 10_000), min_size=1, max_size=20).map(sorted),
    rank=st.floats(0, 1),
)
def test_quantiles_are_those_of_the_evaluation(points: list[int], rank: float) -> None:
    lengths = Lengths(tuple(points))
    assert np.isclose(lengths.quantile(rank), quantiles(lengths, [rank])[0])
