"""Which worker runs on which CPU cores, and what the zygote is told about a worker.

GPUs are given out in `gpu_placement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.core.types import Role
from tinfer.master.cores import CoreClaims
from tinfer.wire.control import WorkerSpec


class Placement(Struct, frozen=True, kw_only=True):
    """Where one worker lives, and its share of what it lives on.

    `devices` are the UUIDs of the GPUs that it sees, its own `tensor_parallel_size` first;
    `gpu_names` are its own as a user names them. `cpus` are the cores of all its ranks, each of
    which computes with `num_threads` threads on a CPU. `memory_share` is the part of its GPUs'
    memory that it takes; `kv_bytes` is set where the engine is not to find out for itself, for each
    rank alike.
    """

    worker_id: str
    role: Role
    device: Literal["cpu", "cuda"]
    cpus: tuple[int, ...] = ()
    num_threads: int = 1
    devices: tuple[str, ...] = ()
    gpu_names: tuple[str, ...] = ()
    tensor_parallel_size: int = 1
    memory_share: float | None = None
    kv_bytes: int | None = None

    @property
    def label(self) -> str:
        if self.device == "cuda":
            return f"GPU {'+'.join(self.gpu_names)}"
        numbers = sorted(set(self.cpus))
        return f"core{'s' * (len(numbers) > 1)} {_ranges(numbers)}" if numbers else "CPU"

    @property
    def own_devices(self) -> tuple[str, ...]:
        return self.devices[: self.tensor_parallel_size]


def on_cpu(config: ServeConfig, num_threads: int | None, claims: CoreClaims) -> list[Placement]:
    """One placement per worker, prefill workers first: one prefill and one decode worker unless
    told otherwise.

    Each rank gets `num_threads` cores, by default an equal part of those that are free; with fewer
    cores than ranks, workers share them (`claims.notes` says so).
    """
    prefill = 1 if config.prefill is None else config.prefill
    decode = 1 if config.decode is None else config.decode
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
    num_ranks = len(roles) * config.tensor_parallel_size
    if num_threads is None:
        num_threads = max(1, claims.num_usable // num_ranks)
        cores = claims.take(num_ranks, num_ranks * num_threads)
        num_threads = len(cores) // num_ranks
    else:
        cores = claims.take(num_ranks * num_threads)
    size = config.tensor_parallel_size * num_threads
    return [
        Placement(
            worker_id=worker_id,
            role=role,
            device="cpu",
            cpus=tuple(cores[i * size : (i + 1) * size]),
            num_threads=num_threads,
            tensor_parallel_size=config.tensor_parallel_size,
            kv_bytes=config.kv_cache_memory_bytes,
        )
        for i, (worker_id, role) in enumerate(named(roles))
    ]


def named(roles: Sequence[Role]) -> list[tuple[str, Role]]:
    """Worker ids: the role and a number within the role."""
    seen: dict[Role, int] = {}
    ids = []
    for role in roles:
        ids.append((f"{role.value}-{seen.get(role, 0)}", role))
        seen[role] = seen.get(role, 0) + 1
    return ids


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers for a reader: "0-3,8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def worker_spec(
    config: ServeConfig,
    placement: Placement,
    generation: int,
    model_dir: str,
    socket_path: str,
    log_path: str,
    transport: str,
) -> WorkerSpec:
    """What the zygote needs to start this incarnation."""
    environment: dict[str, str] = {}
    if placement.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
    return WorkerSpec(
        worker_id=placement.worker_id,
        generation=generation,
        engine=config.engine,
        model_dir=model_dir,
        socket_path=socket_path,
        log_path=log_path,
        kv_transport=transport,
        device=placement.device,
        cpus=list(dict.fromkeys(placement.cpus)),
        environment=environment,
        engine_args=_engine_args(config, placement),
        lease_ttl_s=config.lease_ttl,
        fake=config.fake_engine,
        tensor_parallel_size=placement.tensor_parallel_size,
        num_threads=placement.num_threads,
        prefill_order="srpt" if config.prefill_policy == "srpt" else "fcfs",
    )


def _engine_args(config: ServeConfig, placement: Placement) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        **config.engine_arg,
        "dtype": config.dtype,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.step_tokens,
        "gpu_memory_utilization": placement.memory_share or config.gpu_memory_utilization,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enforce_eager": config.enforce_eager,
        "trust_remote_code": config.trust_remote_code,
        "seed": config.seed,
    }
    if config.kv_cache_dtype != "auto":
        arguments["kv_cache_dtype"] = config.kv_cache_dtype
    if config.quantization is not None:
        arguments["quantization"] = config.quantization
    if config.reasoning_parser is not None:
        # A grammar of theirs holds from the end of the reasoning on.
        arguments["reasoning_parser"] = config.reasoning_parser
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if config.block_size is not None:
        arguments["block_size"] = config.block_size
    if placement.kv_bytes is not None:
        arguments["kv_cache_memory_bytes"] = placement.kv_bytes
    return arguments
