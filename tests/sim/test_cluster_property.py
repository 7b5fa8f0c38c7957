"""Whatever is asked of whatever box, every request ends once and nothing is left over."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.box import COSTS
from tinfer.core.types import Role, SchedulerConfig
from tinfer.sim.baselines import HybridSpec, ReplicasSpec, simulate_hybrid, simulate_replicas
from tinfer.sim.cluster import simulate
from tinfer.sim.results import SimRun
from tinfer.sim.spec import EngineSpec, SimRequest, SimSpec, WorkerSpec

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}
BOXES = ["pd", "ppd", "pddd", "ppdd", "b", "bb", "pbd", "pb", "bd"]

ENGINES = st.builds(
    EngineSpec,
    costs=st.just(COSTS),
    num_blocks=st.integers(8, 40),
    block_tokens=st.sampled_from([2, 4]),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 12),
    prefill_order=st.sampled_from(["fcfs", "srpt"]),
    pads_chunks=st.booleans(),
    prefill_tax=st.sampled_from([0.0, 0.1]),
    prefix_caching=st.booleans(),
    victim=st.sampled_from(["newest", "least-progress"]),
    noise=st.sampled_from([0.0, 0.2]),
)
SCHEDULERS = st.builds(
    SchedulerConfig,
    route=st.sampled_from(["auto", "auto", "split", "whole"]),
    max_num_queued_reqs=st.sampled_from([3, 1000]),
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[SimRequest, ...]:
    """Some requests, few of which share a prefix and few of which are too large."""
    made = []
    for number in range(draw(st.integers(1, 12))):
        prompt, out = draw(st.integers(1, 30)), draw(st.integers(1, 20))
        num_shared = min(prompt // 4, draw(st.sampled_from([0, 0, 2, 7])))
        made.append(
            SimRequest(
                request_id=f"r{number}",
                arrival_s=draw(st.integers(0, 40)) / 2,
                prompt_tokens=prompt,
                output_tokens=out,
                max_output_tokens=out + draw(st.sampled_from([0, 0, 30])),
                block_hashes=tuple(range(100, 100 + num_shared)),
                patience_s=draw(st.sampled_from([None, None, None, 0.1, 4.0])),
            )
        )
    return tuple(made)


def check(run: SimRun, asked: tuple[SimRequest, ...], is_bounded: bool) -> None:
    errors = {None, "cancelled", "refused"} | ({"queue-full"} if is_bounded else set())
    for got, one in zip(run.requests, asked, strict=True):
        assert got.request_id == one.request_id
        assert got.error in errors
        assert got.error != "cancelled" or one.patience_s is not None
        assert not got.ok or got.output_tokens == one.output_tokens
    assert run.busy_s <= run.resource_s + 1e-9
    for worker in run.workers:
        assert worker.step_s >= 0.0


@settings(max_examples=150)
@given(
    letters=st.sampled_from(BOXES),
    engine=ENGINES,
    asked=requests(),
    scheduler=SCHEDULERS,
    message_s=st.sampled_from([0.0, 0.0002, 0.3]),
    tick_s=st.sampled_from([None, 0.7]),
)
def test_tinfer_ends_every_request_once(
    letters: str,
    engine: EngineSpec,
    asked: tuple[SimRequest, ...],
    scheduler: SchedulerConfig,
    message_s: float,
    tick_s: float | None,
) -> None:
    workers = tuple(
        WorkerSpec(worker_id=f"{letter}{place}", role=ROLES[letter], engine=engine)
        for place, letter in enumerate(letters)
    )
    spec = SimSpec(
        workers=workers,
        requests=asked,
        scheduler=scheduler,
        message_s=message_s,
        tick_s=tick_s,
        seed=1,
    )
    # Accounts of the scheduler and blocks of the engines are checked in there.
    check(simulate(spec), asked, is_bounded=True)


@settings(max_examples=75)
@given(engine=ENGINES, asked=requests(), num=st.integers(1, 3), bound=st.integers(0, 40))
def test_the_baselines_end_every_request_once(
    engine: EngineSpec, asked: tuple[SimRequest, ...], num: int, bound: int
) -> None:
    spec = ReplicasSpec(engine=engine, num_replicas=num, requests=asked)
    check(simulate_replicas(spec), asked, is_bounded=False)
    workers = tuple(
        WorkerSpec(worker_id=f"{letter}{place}", role=ROLES[letter], engine=engine)
        for place, letter in enumerate("p" + num * "d")
    )
    hybrid = HybridSpec(workers=workers, requests=asked, split_from_tokens=bound)
    check(simulate_hybrid(hybrid), asked, is_bounded=False)
