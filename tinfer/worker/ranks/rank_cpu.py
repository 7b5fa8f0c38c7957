"""A rank on CPU cores. In a module of its own: vLLM's CPU worker is imported on a CPU only."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from tinfer.worker.eager import compute_eagerly
from tinfer.worker.ranks.plan import plan_of
from tinfer.worker.ranks.queues import nap_in_queues
from tinfer.worker.ranks.rank import Rank
from tinfer.worker.seeded_chunks import patch_cpu_runner
from tinfer.worker.threads import set_threads


class CpuRank(Rank, CPUWorker):
    """Its threads float on the rank's own cores."""

    def __init__(self, vllm_config: VllmConfig, local_rank: int, *args: Any, **kwargs: Any) -> None:
        nap_in_queues()
        compute_eagerly()
        patch_cpu_runner()
        set_threads(plan_of(vllm_config).num_threads)
        super().__init__(vllm_config, local_rank, *args, **kwargs)
