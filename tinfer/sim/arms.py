"""What is compared: tinfer under some policies, and what it is compared with. Plain data.

An arm says everything about its side of a run but the requests, so that it can be sent to another
process and written into a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from tinfer.config import ServeConfig
from tinfer.core.costs import CostModel
from tinfer.core.lengths import Lengths
from tinfer.core.types import SchedulerConfig
from tinfer.errors import StartError
from tinfer.predict.asked import Asked, End, LearningPredictor
from tinfer.predict.asked import Predictor as LengthPredictor
from tinfer.predict.predictors import PREDICTORS, NoisyOracle
from tinfer.sim.baselines import HybridSpec, ReplicasSpec, simulate_hybrid, simulate_replicas
from tinfer.sim.boxes import Box, paper_vllm_of, workers_of
from tinfer.sim.cluster import simulate
from tinfer.sim.presets import replica_of
from tinfer.sim.results import SimRun
from tinfer.sim.spec import EngineSpec, SimRequest, SimSpec, WorkerSpec

BASELINES = ("replicas", "replicas-N", "hybrid", "paper")
# Under this many tokens a prompt of the static hybrid is not split. Source: the naive hybrid of the
# measurements that this project started from.
SPLIT_FROM_TOKENS = 128

# From the options of `tinfer serve` to what the scheduler goes by; the command line brings it.
SchedulerOf = Callable[[ServeConfig, CostModel], SchedulerConfig]


class PredictorSpec(Struct, frozen=True, kw_only=True):
    """A predictor by name; accuracy, granularity and seed are noisy-oracle's."""

    name: str
    accuracy: float
    granularity: int
    seed: int

    def build(self) -> LengthPredictor:
        if self.name == "noisy-oracle":
            return NoisyOracle(self.accuracy, self.granularity, self.seed)
        return PREDICTORS[self.name]()


class TinferArm(Struct, frozen=True, kw_only=True, tag="tinfer"):
    """tinfer's own scheduler in front of these workers."""

    name: str
    workers: tuple[WorkerSpec, ...]
    scheduler: SchedulerConfig
    predictor: PredictorSpec


class ReplicasArm(Struct, frozen=True, kw_only=True, tag="replicas"):
    """Plain engines behind the balancer; the paper's vLLM is one of them."""

    name: str
    engine: EngineSpec
    num_replicas: Annotated[int, Meta(ge=1)]


class HybridArm(Struct, frozen=True, kw_only=True, tag="hybrid"):
    """Short prompts whole on decode workers, the others split, by a fixed bound."""

    name: str
    workers: tuple[WorkerSpec, ...]
    split_from_tokens: int


Arm = TinferArm | ReplicasArm | HybridArm


class _Predictor:
    """A predictor as the simulator asks it: it is shown the truth, which only oracles look at."""

    def __init__(self, predictor: LengthPredictor) -> None:
        self._predictor = predictor

    def predict(self, request: SimRequest) -> Lengths:
        return self._predictor.predict(_asked(request))


class _Learner(_Predictor):
    """The same for one that is told how answers end."""

    def __init__(self, predictor: LearningPredictor) -> None:
        super().__init__(predictor)
        self._learner = predictor

    def observe(self, request: SimRequest, output_tokens: int, end: End) -> None:
        self._learner.observe(_asked(request), output_tokens, end)


def _asked(request: SimRequest) -> Asked:
    return Asked(
        request.request_id,
        request.prompt_tokens,
        request.max_output_tokens,
        request.output_tokens,
        features=request.features,
    )


def _of_one_run(spec: PredictorSpec) -> _Predictor:
    predictor = spec.build()
    if isinstance(predictor, LearningPredictor):
        return _Learner(predictor)
    return _Predictor(predictor)


def tinfer_arm(
    name: str,
    box: Box,
    num_prefill: int,
    num_decode: int,
    config: ServeConfig,
    scheduler_of: SchedulerOf,
) -> TinferArm:
    """tinfer as these options make it. Raises `StartError` for options that contradict."""
    predictor = PredictorSpec(
        name=config.predictor,
        accuracy=config.predictor_accuracy,
        granularity=config.predictor_granularity,
        seed=config.seed,
    )
    return TinferArm(
        name=name,
        workers=workers_of(box, num_prefill, num_decode, config),
        scheduler=scheduler_of(config, box.decode.costs),
        predictor=predictor,
    )


def baseline_arm(
    kind: str,
    box: Box,
    num_prefill: int,
    num_decode: int,
    config: ServeConfig,
    split_from_tokens: int = SPLIT_FROM_TOKENS,
) -> Arm:
    """What stands beside tinfer on the same devices, by a name of `BASELINES`.

    `replicas-N` are replicas with N tokens per step. Raises `StartError` for another name, or a
    hybrid without a worker of each role.
    """
    num_engines = num_prefill + num_decode
    word, _, tokens = kind.partition("-")
    if kind == "hybrid":
        if not (num_prefill and num_decode):
            raise StartError("the static hybrid needs a prefill and a decode worker")
        workers = workers_of(box, num_prefill, num_decode, config)
        return HybridArm(name=kind, workers=workers, split_from_tokens=split_from_tokens)
    if kind == "paper":
        engine = paper_vllm_of(box, num_engines)
        return ReplicasArm(name=kind, engine=engine, num_replicas=1)
    if kind == "replicas":
        return replicas_arm(box, num_engines, config)
    if word == "replicas" and tokens.isdecimal() and int(tokens) > 0:
        return replicas_arm(box, num_engines, config, int(tokens))
    raise StartError(f"no baseline is called {kind}; there are: {', '.join(BASELINES)}")


def replicas_arm(
    box: Box, num_replicas: int, config: ServeConfig, step_tokens: int | None = None
) -> ReplicasArm:
    """Plain replicas, with vLLM's own step budget or another one. Their sequences per step and
    whether they cache prefixes are as tinfer's, as in `tinfer bench compare`."""
    engine = replica_of(box.replica, step_tokens)
    return ReplicasArm(
        name="replicas" if step_tokens is None else f"replicas-{step_tokens}",
        engine=replace(
            engine,
            max_num_seqs=min(config.max_num_seqs, engine.max_num_batched_tokens),
            prefix_caching=config.enable_prefix_caching,
        ),
        num_replicas=num_replicas,
    )


def run_arm(arm: Arm, requests: Sequence[SimRequest], seed: int = 0) -> SimRun:
    """One run to its end; `seed` is of the engines' noise. Raises `SimulationError`."""
    given = tuple(requests)
    match arm:
        case TinferArm():
            return simulate(
                SimSpec(
                    workers=arm.workers,
                    requests=given,
                    scheduler=arm.scheduler,
                    predictor=_of_one_run(arm.predictor),
                    seed=seed,
                )
            )
        case ReplicasArm():
            return simulate_replicas(
                ReplicasSpec(
                    engine=arm.engine, num_replicas=arm.num_replicas, requests=given, seed=seed
                )
            )
        case HybridArm():
            return simulate_hybrid(
                HybridSpec(
                    workers=arm.workers,
                    requests=given,
                    split_from_tokens=arm.split_from_tokens,
                    seed=seed,
                )
            )


def num_devices_of(arm: Arm) -> int:
    """Devices that the arm has."""
    if isinstance(arm, ReplicasArm):
        return arm.num_replicas * arm.engine.num_devices
    return sum(worker.engine.num_devices for worker in arm.workers)
