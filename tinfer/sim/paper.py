"""The paper's experiments as it states them: requests, engines, modes, and what it published.

Source of all: arXiv 2401.11181, sections 5.1 and 5.2. What it leaves open is decided here, before
anything was compared, and is nowhere fitted to its results:

- lengths are `tinfer.workloads`' own, one model for all five workloads; everything arrives at once;
- 128 requests for LPLD, LPHD and Mixed; 32 for HPLD and HPHD, as the plots look;
- its vLLM is one engine on two GPUs with 16 sequences, and its own system two engines of that kind;
- the emulated link is NVLink, which the published resource times belong to;
- figure 16 is Mixed; figure 18 is 256 requests of LPHD or Mixed on a decode engine with a seat for
  each, so that it is memory that binds;
- figure 19 has 32 heavy decodes in all, and as many light ones as make 32 per decode engine, which
  is what its heavy and light counts add up to, and tells them apart without error, as those do;
- a client allows 2048 tokens, so that no length is given away by what was asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from tinfer.config import ServeConfig
from tinfer.core.policies.decode import anywhere
from tinfer.core.policies.interfaces import Admits
from tinfer.core.policies.registry import DECODE_CHOICES
from tinfer.core.requests import Request as CoreRequest
from tinfer.core.types import Role, SchedulerConfig
from tinfer.core.worker import Worker
from tinfer.predict.predictors import PAPER_ACCURACY, PAPER_GRANULARITY_TOKENS
from tinfer.sim import presets
from tinfer.sim.arms import PredictorSpec, ReplicasArm, SchedulerOf, TinferArm
from tinfer.sim.boxes import preset_box, taxed
from tinfer.sim.spec import SimRequest, WorkerSpec
from tinfer.sim.workload import sim_requests
from tinfer.workloads import WorkloadSpec, make

# Section 5.2.2: the predictor beside the prompts makes prefills 10 % slower on the mean.
PREDICTOR_TAX = 1.1
NUM_REQUESTS = {"LPLD": 128, "LPHD": 128, "HPLD": 32, "HPHD": 32, "Mixed": 128}
MAX_TOKENS = 2048
NUM_ADMISSION_REQUESTS = 256
NUM_HEAVY = NUM_PER_DECODE = 32
ORDERS = (("fcfs", 16), ("sjf", 16), ("ljf", 16), ("fcfs", 128), ("sjf", 128), ("ljf", 128))
ADMISSIONS = ("greedy", "reserve-static", "reserve-dynamic", "peak")
PREDICTIONS = ("oracle", "noisy-oracle")
NUMS_OF_DECODE = (2, 4, 8)
IMBALANCE, RANDOM = "imbalance", "random"
CHOICES = (IMBALANCE, RANDOM, "power-of-two", "projected")

VLLM, TETRI, REPLICAS, AUTO = "vLLM", "TetriInfer", "replicas", "auto"
# What could explain the cells that are off, scored nowhere: prompts that are not merged into
# chunks, and passes that take so much longer each that LPLD comes out as published.
UNMERGED, UNMERGED_SLOWER = "unmerged", "unmerged, +41 ms"
EXTRA_PASS_S = 0.041


class Published(Struct, frozen=True):
    """Change against its vLLM in percent; None where the paper has no number. `scored` are the
    figures that count, and `points` how far from them ours may be."""

    ttft: float | None
    e2el: float
    resource: float
    scored: tuple[str, ...]
    points: float


HEADLINE = {
    "LPLD": Published(-44.0, -40.0, 0.0, ("ttft", "e2el", "resource"), 10.0),
    "LPHD": Published(-97.0, -47.0, -38.0, ("ttft", "e2el", "resource"), 5.0),
    "HPLD": Published(-9.0, -23.0, 43.0, ("e2el", "resource"), 10.0),
    "HPHD": Published(None, -19.0, 7.0, ("e2el", "resource"), 10.0),
    "Mixed": Published(-85.0, -50.0, -21.0, ("ttft", "e2el", "resource"), 5.0),
}
# Figure 16, section 5.2.1: changes of mean TTFT in percent (the second: of the wait).
FIGURE_16 = {
    ("fcfs-16", VLLM): -86.4,
    ("sjf-16", "fcfs-16"): -7.8,
    ("sjf-128", "sjf-16"): -46.5,
}
# Figure 18, read off its plot: seconds of mean job completion time.
FIGURE_18_S = {
    ("greedy", "oracle"): 44.4,
    ("reserve-static", "oracle"): 39.6,
    ("reserve-dynamic", "oracle"): 38.7,
    ("greedy", "noisy-oracle"): 44.4,
    ("reserve-static", "noisy-oracle"): 47.7,
    ("reserve-dynamic", "noisy-oracle"): 43.6,
}
# Figure 19, read off its plot: seconds until all is decoded.
FIGURE_19_S = {
    (IMBALANCE, 2): 13.9,
    (IMBALANCE, 4): 13.9,
    (IMBALANCE, 8): 13.9,
    (RANDOM, 2): 12.6,
    (RANDOM, 4): 11.9,
    (RANDOM, 8): 10.9,
    ("power-of-two", 2): 11.8,
    ("power-of-two", 4): 10.6,
    ("power-of-two", 8): 4.0,
}


class Setting(Struct, frozen=True, kw_only=True):
    """What a reader may want to vary; the defaults are what is reported."""

    predictor_tax: float = PREDICTOR_TAX
    accuracy: float = PAPER_ACCURACY
    granularity: int = PAPER_GRANULARITY_TOKENS


# --- requests ------------------------------------------------------------------------------------


def requests_of(workload: str, num: int, seed: int) -> tuple[SimRequest, ...]:
    """All at once, from the one length model."""
    spec = WorkloadSpec(name=workload, num_requests=num, seed=seed, at_once=True)
    return sim_requests(make(spec), presets.PAPER_ENGINE.block_tokens, MAX_TOKENS)


def dispatch_requests(num_decode: int, seed: int) -> tuple[SimRequest, ...]:
    """Figure 19: light prompts, of which 32 have heavy decodes, in random order."""
    heavy = requests_of("LPHD", NUM_HEAVY, seed)
    light = requests_of("LPLD", NUM_PER_DECODE * num_decode - NUM_HEAVY, seed)
    rng = random.Random(f"tinfer paper dispatch {seed}")
    return tuple(sorted((*heavy, *light), key=lambda one: rng.random()))


# --- arms ----------------------------------------------------------------------------------------


def paper_scheduler(seed: int, **changed: object) -> SchedulerConfig:
    """The paper's mode of every mechanism, but what is `changed`."""
    modes = SchedulerConfig(
        route="split",
        prefill_order="sjf",
        prefill_sched_batch=16,
        prefill_choice="least-loaded",
        whole_choice="least-loaded",
        decode_choice="power-of-two",
        decode_admission="reserve-dynamic",
        dispatch="first-chunk",
        preemption="here",
        prefill_budget="whole-chunks",
        costs=presets.PAPER_ENGINE.costs,
        seed=seed,
    )
    return replace(modes, **changed)


def tetri_arm(
    name: str,
    scheduler: SchedulerConfig,
    setting: Setting,
    predictor: str = "noisy-oracle",
    num_decode: int = 1,
    num_seats: int = presets.PAPER_DECODE_NUM_SEQS,
) -> TinferArm:
    """One prefill engine beside `num_decode` decode engines, as the paper has them: a chunk that is
    not full is padded with zeros."""
    box = preset_box("paper")
    prefill = replace(taxed(box.prefill, setting.predictor_tax), pads_chunks=True)
    return TinferArm(
        name=name,
        workers=presets.workers(
            prefill, 1, replace(box.decode, max_num_seqs=num_seats), num_decode
        ),
        scheduler=scheduler,
        predictor=predictor_spec(predictor, setting, scheduler.seed),
    )


def predictor_spec(name: str, setting: Setting, seed: int) -> PredictorSpec:
    return PredictorSpec(
        name=name, accuracy=setting.accuracy, granularity=setting.granularity, seed=seed
    )


def vllm_arm() -> ReplicasArm:
    """The paper's baseline: one engine."""
    return ReplicasArm(name=VLLM, engine=presets.PAPER_VLLM, num_replicas=1)


def replicas_arm(num_engines: int = 2) -> ReplicasArm:
    """The honest one: today's plain engines on all GPUs that the other side has."""
    return ReplicasArm(name=REPLICAS, engine=presets.PAPER_REPLICA, num_replicas=num_engines)


def auto_arm(setting: Setting, seed: int, scheduler_of: SchedulerOf) -> TinferArm:
    """tinfer with the defaults of `tinfer serve`, on the paper's engines, with its predictor."""
    scheduler = scheduler_of(ServeConfig(seed=seed), presets.PAPER_ENGINE.costs)
    return with_engines(
        tetri_arm(AUTO, scheduler, setting), victim="least-progress", pads_chunks=False
    )


def with_engines(arm: TinferArm, **changed: object) -> TinferArm:
    """The same with our workers' order of prompts, and what else is `changed` of their engines."""
    workers = tuple(
        replace(one, engine=replace(one.engine, prefill_order="srpt", **changed))
        for one in arm.workers
    )
    return replace(arm, workers=workers)


def headline_arms(
    setting: Setting, seed: int, scheduler_of: SchedulerOf
) -> list[TinferArm | ReplicasArm]:
    """Figures 11 to 15, and what could explain them."""
    tetri = tetri_arm(TETRI, paper_scheduler(seed), setting)
    explaining = [
        one_prompt_per_pass(UNMERGED, tetri, 0.0),
        one_prompt_per_pass(UNMERGED_SLOWER, tetri, EXTRA_PASS_S),
    ]
    auto = auto_arm(setting, seed, scheduler_of)
    return [vllm_arm(), tetri, replicas_arm(), auto, *explaining]


def one_prompt_per_pass(name: str, arm: TinferArm, extra_s: float) -> TinferArm:
    """The same with prefill engines whose steps hold one prompt each, and take that much longer."""
    return replace(arm, name=name, workers=tuple(_unmerged(one, extra_s) for one in arm.workers))


def _unmerged(worker: WorkerSpec, extra_s: float) -> WorkerSpec:
    if worker.role is not Role.PREFILL:
        return worker
    costs = replace(worker.engine.costs, base_s=worker.engine.costs.base_s + extra_s)
    return replace(worker, engine=replace(worker.engine, max_num_seqs=1, costs=costs))


def order_arms(setting: Setting, seed: int) -> list[TinferArm | ReplicasArm]:
    """Figure 16: prefill policies."""
    ours = [
        tetri_arm(
            f"{order}-{batch}",
            paper_scheduler(seed, prefill_order=order, prefill_sched_batch=batch),
            setting,
        )
        for order, batch in ORDERS
    ]
    srpt = tetri_arm("srpt", paper_scheduler(seed, prefill_order="srpt"), setting)
    return [vllm_arm(), *ours, with_engines(srpt), replicas_arm()]


def admission_arms(setting: Setting, seed: int) -> list[TinferArm | ReplicasArm]:
    """Figure 18: decode admission, under ideal and under the paper's own prediction."""
    ours = [
        tetri_arm(
            f"{admission}/{prediction}",
            paper_scheduler(seed, decode_admission=admission),
            setting,
            predictor=prediction,
            num_seats=NUM_ADMISSION_REQUESTS,
        )
        for prediction in PREDICTIONS
        for admission in ADMISSIONS
    ]
    return [*ours, replicas_arm()]


def choice_arms(setting: Setting, seed: int, num_decode: int) -> list[TinferArm | ReplicasArm]:
    """Figure 19: which decode worker."""
    register_choices()
    ours = [
        tetri_arm(
            choice, paper_scheduler(seed, decode_choice=choice), setting, "oracle", num_decode
        )
        for choice in CHOICES
    ]
    return [*ours, replicas_arm(1 + num_decode)]


class Imbalance:
    """The paper's worst case: every heavy decode on one worker, the light ones on the others."""

    def choose(
        self, request: CoreRequest, candidates: Sequence[Worker], admits: Admits = anywhere
    ) -> Worker | None:
        admitted = sorted(filter(admits, candidates), key=lambda worker: worker.id)
        if not admitted:
            return None
        first, *others = admitted
        if request.lengths.is_heavy or not others:
            return first
        return min(others, key=lambda worker: (worker.num_seqs, worker.id))


class AtRandom:
    """Any worker alike."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"tinfer paper random {seed}")

    def choose(
        self, request: CoreRequest, candidates: Sequence[Worker], admits: Admits = anywhere
    ) -> Worker | None:
        admitted = list(filter(admits, candidates))
        return self._rng.choice(admitted) if admitted else None


def register_choices() -> None:
    """Makes the two that only this comparison has known to the scheduler of this process."""
    made: dict[str, Callable[[SchedulerConfig], Imbalance | AtRandom]] = {
        IMBALANCE: lambda config: Imbalance(),
        RANDOM: lambda config: AtRandom(config.seed),
    }
    DECODE_CHOICES.update(made)
