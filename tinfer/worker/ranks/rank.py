"""One rank of a tensor-parallel worker: a process of its own, with a part of the model.

vLLM starts the process and builds the class that is named here. Before anything else happens in it,
the rank makes sure that it cannot outlive its worker, takes its cores, and gives its shared memory
names that tell whose they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu_worker import Worker

from tinfer.worker.model_inspection import inspect_in_this_process
from tinfer.worker.prctl import die_with_parent
from tinfer.worker.ranks.names import use_prefix
from tinfer.worker.ranks.plan import RankPlan, plan_of
from tinfer.worker.ranks.queues import shrink_queues


class Rank:
    """Goes in front of vLLM's worker class. A start that fails leaves its reason in a file: vLLM
    tells the worker only that there was one."""

    def __init__(self, vllm_config: VllmConfig, local_rank: int, *args: Any, **kwargs: Any) -> None:
        self._plan = plan_of(vllm_config)
        self._rank_number = local_rank
        enter_rank(self._plan, local_rank)
        with self._reason_kept():
            super().__init__(vllm_config, local_rank, *args, **kwargs)  # type: ignore[call-arg]

    def init_device(self) -> None:
        with self._reason_kept():
            super().init_device()  # type: ignore[misc]

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        with self._reason_kept():
            return super().load_model(*args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _reason_kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._plan.error_file(self._rank_number).write_text(reason)
            raise


class GpuRank(Rank, Worker):
    """A rank on a GPU; which one, vLLM takes from the rank's number."""


def enter_rank(plan: RankPlan, rank: int) -> None:
    """Bind this process to its worker and its cores. Idempotent where it was forked."""
    die_with_parent(plan.worker_pid)
    use_prefix(plan.prefix)
    shrink_queues()
    inspect_in_this_process()
    if plan.cpus[rank]:
        os.sched_setaffinity(0, plan.cpus[rank])
