"""What a worker sets up around the building of an engine with several ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from tinfer.wire.control import WorkerSpec
from tinfer.worker.kv.lease import MAX_READERS
from tinfer.worker.ranks.executor import RankExecutor
from tinfer.worker.ranks.names import unlink_names, use_prefix
from tinfer.worker.ranks.plan import CONFIG_KEY, make_plan
from tinfer.worker.ranks.queues import nap_in_queues, shrink_queues
from tinfer.worker.ranks.shm_room import SHM, shm_obstacle

# Source: sockaddr_un holds 108 bytes with the final zero; vLLM's sockets are named by a UUID.
MAX_SOCKET_PATH_BYTES = 107
_UUID_CHARS = 36
_RANK_CLASS = {
    "cpu": "tinfer.worker.ranks.rank_cpu.CpuRank",
    "cuda": "tinfer.worker.ranks.rank.GpuRank",
}


class RanksFailed(Exception):
    """An engine with several ranks cannot be built; the message is for a person."""


class RanksOf:
    """Entered around the building of the engine: inside, this process is set up to start ranks.

    Once the engine stands, every rank has opened what it needs from /dev/shm, so that all names are
    removed there: from then on no kill, of whichever process, can leave one behind.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._plan = make_plan(spec, os.getpid())

    def __enter__(self) -> RanksOf:
        """Raises `RanksFailed` for what can be known to fail."""
        num_ranks = self._spec.tensor_parallel_size
        if num_ranks > MAX_READERS:
            raise RanksFailed(f"--tensor-parallel-size is at most {MAX_READERS}, not {num_ranks}")
        num_bytes = len(os.fsencode(self._plan.folder)) + 1 + _UUID_CHARS
        if num_bytes > MAX_SOCKET_PATH_BYTES:
            raise RanksFailed(
                f"the ranks' sockets do not fit below {Path(self._plan.folder).parent}: their "
                f"paths have {num_bytes} bytes of {MAX_SOCKET_PATH_BYTES}; set XDG_RUNTIME_DIR"
            )
        if reason := self._shm_obstacle():
            raise RanksFailed(reason)
        os.environ["VLLM_RPC_BASE_PATH"] = self._plan.folder
        # vLLM's own binding counts NUMA nodes; `Rank` binds by the plan.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # All ranks are on this machine: no need to listen to anybody else.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        use_prefix(self._plan.prefix)
        shrink_queues()
        if self._spec.device == "cpu":
            nap_in_queues()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unlink_names(self._plan.prefix)
        if error is not None and (reasons := self._reasons()):
            raise RanksFailed("; ".join(reasons)) from error

    def _reasons(self) -> list[str]:
        """Why the ranks did not start, as far as more is known than what vLLM says."""
        reasons = self._plan.start_errors()
        # Room that was there before may have gone to another worker meanwhile.
        obstacle = self._shm_obstacle()
        if obstacle is None and any("nccl" in reason.lower() for reason in reasons):
            free_mib = shutil.disk_usage(SHM).free >> 20
            obstacle = f"NCCL needs room in /dev/shm, and {free_mib} MiB are free"
        return [*reasons, obstacle] if obstacle else reasons

    def _shm_obstacle(self) -> str | None:
        spec = self._spec
        return shm_obstacle(spec.tensor_parallel_size, spec.num_threads, spec.device)

    def connector_config(self) -> dict[str, Any]:
        """What the ranks find in the connector's configuration."""
        return {CONFIG_KEY: msgspec.to_builtins(self._plan)}

    def engine_args(self) -> dict[str, Any]:
        """vLLM's engine arguments for the ranks; memory for KV blocks is per rank there."""
        arguments: dict[str, Any] = {
            "tensor_parallel_size": self._spec.tensor_parallel_size,
            "distributed_executor_backend": RankExecutor,
            "worker_cls": _RANK_CLASS[self._spec.device],
        }
        kv_bytes = self._spec.engine_args.get("kv_cache_memory_bytes")
        if kv_bytes is not None:
            arguments["kv_cache_memory_bytes"] = int(kv_bytes) // self._spec.tensor_parallel_size
        return arguments
