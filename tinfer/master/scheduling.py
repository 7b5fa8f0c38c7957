"""The scheduler's configuration and the length predictor, from the server's options."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

from tinfer.config import ServeConfig
from tinfer.core.costs import CostModel
from tinfer.core.types import SchedulerConfig
from tinfer.predict.asked import Predictor
from tinfer.predict.predictors import PREDICTORS, NoisyOracle

TOKEN_BYTES = 4
HASH_BYTES = 8


def scheduler_config(config: ServeConfig, costs: CostModel) -> SchedulerConfig:
    """What the core goes by; `costs` are of this box and model, or a default."""
    slo_s = config.slo_s
    return SchedulerConfig(
        route=config.route,
        prefill_order=config.prefill_policy,
        prefill_sched_batch=config.prefill_sched_batch,
        ageing=config.prefill_ageing,
        # What is promised is also what the order goes by.
        ttft_deadline_s=config.ttft_deadline or slo_s.get("ttft"),
        prefill_choice=config.prefill_choice,
        whole_choice=config.prefill_choice,
        decode_choice=config.decode_policy,
        decode_admission=config.decode_admission,
        dispatch=config.dispatch,
        preemption=config.preemption,
        prefill_budget=config.prefill_budget,
        itl_slack=config.itl_slack,
        flip=config.flip,
        overflow_z=NormalDist().inv_cdf(1.0 - config.overflow_risk),
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        slo_ttft_s=slo_s.get("ttft"),
        slo_tpot_s=slo_s.get("tpot"),
        max_request_restarts=config.max_request_restarts,
        costs=costs,
        seed=config.seed,
    )


def predictor_of(config: ServeConfig) -> Predictor:
    """The predictor that the options name."""
    if config.predictor == "noisy-oracle":
        return NoisyOracle(config.predictor_accuracy, config.predictor_granularity, config.seed)
    return PREDICTORS[config.predictor]()


def block_hashes(prompt: bytes, block_tokens: int) -> tuple[int, ...]:
    """One hash per whole block of a prompt (int32 token ids), each of all up to its end.

    A block costs about a microsecond; a prompt of 20K tokens in blocks of 16 about 1.5 ms.
    """
    size = block_tokens * TOKEN_BYTES
    chain = hashlib.blake2b(digest_size=HASH_BYTES)
    hashes = []
    for start in range(0, len(prompt) - size + 1, size):
        chain.update(prompt[start : start + size])
        hashes.append(int.from_bytes(chain.digest(), "little"))
    return tuple(hashes)
