"""A long prompt among more short ones than there is time for: ageing bounds how long it waits."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.sim.box import request
from tinfer.core.types import Role, SchedulerConfig
from tinfer.sim import presets
from tinfer.sim.cluster import simulate
from tinfer.sim.spec import SimSpec, WorkerSpec

SHORT_TOKENS, LONG_TOKENS = 400, 4000
# 0.1 s each and the base of a step: a fifth more than there is time for, over 40 s.
SHORTS = tuple(
    request(f"short-{number}", SHORT_TOKENS, 1, at_s=number / 12.0) for number in range(480)
)
LONG = request("long", LONG_TOKENS, 1, at_s=1.0)
LAST_S = SHORTS[-1].arrival_s


def waited_s(ageing: float, route: str) -> float:
    engine = replace(
        presets.PAPER_ENGINE, prefill_order="srpt", max_num_batched_tokens=512, prefix_caching=False
    )
    run = simulate(
        SimSpec(
            workers=(WorkerSpec(worker_id="b", role=Role.BOTH, engine=engine),),
            requests=tuple(sorted((*SHORTS, LONG), key=lambda one: one.arrival_s)),
            scheduler=SchedulerConfig(costs=engine.costs, route=route, ageing=ageing),
        )
    )
    (long,) = [one for one in run.requests if one.request_id == "long"]
    assert long.last_token_s is not None
    return long.last_token_s - long.arrival_s


@pytest.mark.parametrize("route", ["auto", "whole"])
def test_a_long_prompt_is_computed_while_short_ones_go_on_coming(route: str) -> None:
    """It is worth 0.9 s of prefill more than a short one, so what comes 9 s after it stays behind;
    by then two seconds of what came before wait as well."""
    assert waited_s(0.1, route) < 18.0


def test_without_ageing_it_waits_for_the_last_of_them() -> None:
    assert waited_s(1e-9, "auto") > LAST_S - LONG.arrival_s
