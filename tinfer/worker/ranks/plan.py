"""What the ranks of a tensor-parallel worker are told at their start, and which cores each gets.

It travels to the rank processes inside vLLM's configuration, as plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tinfer.wire.control import WorkerSpec
from tinfer.worker.ranks.names import name_prefix, worker_folder

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "ranks"


class RankPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`cpus[r]` are the cores of rank r (empty: not bound), `num_threads` its OpenMP threads.

    Every name that a rank makes in /dev/shm starts with `prefix`; its files are in `folder`.
    """

    worker_pid: int
    prefix: str
    folder: str
    cpus: list[list[int]]
    num_threads: int

    def error_file(self, rank: int) -> Path:
        """Where a rank that cannot start says why."""
        return Path(self.folder) / f"rank-{rank}.error"

    def start_errors(self) -> list[str]:
        """Why ranks could not start, as far as they said so."""
        files = [self.error_file(rank) for rank in range(len(self.cpus))]
        return [f"rank {n}: {file.read_text()}" for n, file in enumerate(files) if file.exists()]


def make_plan(spec: WorkerSpec, worker_pid: int) -> RankPlan:
    """The plan of the worker that `spec` describes and process `worker_pid` is."""
    run_dir = Path(spec.socket_path).parent
    return RankPlan(
        worker_pid=worker_pid,
        prefix=name_prefix(run_dir, worker_pid),
        folder=str(worker_folder(run_dir, worker_pid)),
        cpus=share_out(spec.cpus, spec.tensor_parallel_size),
        num_threads=spec.num_threads,
    )


def plan_of(config: VllmConfig) -> RankPlan:
    """The plan that `make_plan` made, out of vLLM's configuration."""
    assert config.kv_transfer_config is not None
    plan = config.kv_transfer_config.kv_connector_extra_config[CONFIG_KEY]
    return msgspec.convert(plan, RankPlan)


def share_out(cpus: Sequence[int], num_ranks: int) -> list[list[int]]:
    """An even share of the cores for each rank; too few for that, and all ranks share them all."""
    share = len(cpus) // num_ranks
    if share == 0:
        return [list(cpus) for _ in range(num_ranks)]
    return [list(cpus[rank * share : (rank + 1) * share]) for rank in range(num_ranks)]
