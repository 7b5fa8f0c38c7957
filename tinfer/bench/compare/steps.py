"""Which runs a comparison has, and in which order: data, before anything is measured.

Every arm gets the same requests at the same times in a repetition of a point. Repetitions draw
other requests; loads of one workload play the same ones faster. No two runs of an arm share a
prompt, so that nothing is found in a prefix cache but what a workload shares within itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from msgspec import Struct

from tinfer.bench.compare.limits import Unloaded
from tinfer.bench.compare.options import CompareOptions
from tinfer.workloads import WORKLOADS, Request, WorkloadSpec, make

# Repetitions count up from the seed; what is measured before them is apart.
_SEED_STRIDE = 1000
_PROBE_REPETITION = 999
# Arrivals of a probe at the least: of thirty, one or two by chance tell a queue that grows from one
# that does not.
MIN_PROBE_REQUESTS = 60
# Enough of a mix of four classes to find some of each.
_SAMPLED_PER_TASK = 40


class Point(Struct, frozen=True):
    """A workload at a share of its full load."""

    workload: str
    load: float


class Step(Struct, frozen=True):
    """One run: a repetition of a point on the arm of that name."""

    point: Point
    repetition: int
    arm: str

    @property
    def salt(self) -> str:
        """What makes the prompts of this repetition of this point its own; equal for all arms."""
        return f"{self.point.load:g} {self.repetition}"


def points_of(options: CompareOptions) -> list[Point]:
    """By workload, then by load."""
    return [Point(name, load) for name in options.workloads for load in options.loads]


def steps_of(options: CompareOptions, arms: Sequence[str]) -> list[Step]:
    """All runs in their order, drawn from the seed.

    With all arms up, the arms of a repetition of a point follow each other directly, in random
    order: what changes on the machine meanwhile meets all of them alike. With one arm up at a time,
    an arm runs all points of a repetition before the next one starts.
    """
    rng = random.Random(f"tinfer compare order {options.seed}")
    points = points_of(options)
    steps = []
    for repetition in range(options.repetitions):
        if options.residency == "together":
            for point in points:
                order = _shuffled(rng, arms)
                steps += [Step(point, repetition, arm) for arm in order]
        else:
            for arm in _shuffled(rng, arms):
                steps += [Step(point, repetition, arm) for point in points]
    return steps


def requests_of(
    options: CompareOptions, point: Point, repetition: int, full_load_rps: float
) -> list[Request]:
    """The requests of one run, arriving at the point's share of `full_load_rps`."""
    return make(_spec(options, point.workload, repetition, point.load * full_load_rps))


def probe_of(options: CompareOptions, workload: str, rate_rps: float) -> list[Request]:
    """Poisson arrivals at `rate_rps` for about `options.probe_s`, whatever the workload's own, and
    for longer where that is fewer than a verdict needs."""
    num = max(MIN_PROBE_REQUESTS, round(rate_rps * options.probe_s))
    spec = _spec(options, workload, _PROBE_REPETITION, rate_rps, num_requests=num, burstiness=1.0)
    return make(spec)


def unloaded_requests(options: CompareOptions) -> list[Request]:
    """`num_unloaded` requests of each class of the workloads, classes in turn."""
    by_task: dict[str, list[Request]] = {}
    for name in options.workloads:
        num_tasks = len(WORKLOADS[name].tasks)
        num = options.num_unloaded * num_tasks + _SAMPLED_PER_TASK * (num_tasks - 1)
        spec = _spec(options, name, _PROBE_REPETITION - 1, 1.0, num_requests=num)
        fresh: dict[str, list[Request]] = {}
        for request in make(spec):
            fresh.setdefault(request.task, []).append(request)
        for task, requests in fresh.items():
            by_task.setdefault(task, requests[: options.num_unloaded])
    rounds = range(options.num_unloaded)
    return [requests[i] for i in rounds for requests in by_task.values() if i < len(requests)]


def expected_s(
    options: CompareOptions,
    steps: Sequence[Step],
    full_load_rps: Mapping[str, float],
    unloaded: Mapping[str, Unloaded],
) -> float:
    """About how long these runs take: their arrivals, and twice the slowest answer alone."""
    total_s = 0.0
    for step in steps:
        tasks = WORKLOADS[step.point.workload].tasks
        tail_s = max((unloaded[t].longest_e2el_s for t in tasks if t in unloaded), default=0.0)
        rate_rps = step.point.load * full_load_rps[step.point.workload]
        total_s += options.num_requests / rate_rps + 2.0 * tail_s
    return total_s


def _spec(
    options: CompareOptions,
    workload: str,
    repetition: int,
    rate_rps: float,
    num_requests: int | None = None,
    burstiness: float | None = None,
) -> WorkloadSpec:
    return WorkloadSpec(
        name=workload,
        num_requests=num_requests or options.num_requests,
        rate_rps=rate_rps,
        burstiness=burstiness,
        seed=options.seed * _SEED_STRIDE + repetition,
        length_scale=options.length_scale,
        max_prompt_tokens=options.max_prompt_tokens,
        max_output_tokens=options.max_output_tokens,
    )


def _shuffled(rng: random.Random, arms: Sequence[str]) -> list[str]:
    """In an order that is the same on every Python version."""
    return sorted(arms, key=lambda arm: rng.random())
