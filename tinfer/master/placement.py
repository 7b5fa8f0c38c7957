"""Which worker runs on which device or core, and with which engine arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.core.types import Role
from tinfer.errors import StartError
from tinfer.wire.control import WorkerSpec

# On a CPU a worker's KV cache holds at least this much, and at least two longest requests, but
# never more than its share of a quarter of the machine's memory.
CPU_KV_BYTES = 256 << 20


class Placement(Struct, frozen=True):
    """Where one worker lives. `devices` are the GPUs that it sees, its own first."""

    worker_id: str
    role: Role
    device: Literal["cpu", "cuda"]
    cpus: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        if self.device == "cuda":
            return f"GPU {self.devices[0]}"
        return "core " + ",".join(map(str, self.cpus)) if self.cpus else "CPU"


def place(config: ServeConfig) -> list[Placement]:
    """One placement per worker, prefill workers first. Raises `StartError` if they do not fit."""
    roles = [Role.PREFILL] * config.prefill + [Role.DECODE] * config.decode
    gpus = visible_gpus() if config.engine == "vllm" else []
    if gpus:
        if len(roles) > len(gpus):
            raise StartError(
                f"{len(roles)} workers need {len(roles)} GPUs, {len(gpus)} visible: "
                "lower --prefill or --decode"
            )
        return [
            Placement(f"{role.value}-{n}", role, "cuda", devices=_own_first(gpus, i))
            for i, (n, role) in enumerate(_numbered(roles))
        ]
    cores = sorted(os.sched_getaffinity(0))
    return [
        Placement(f"{role.value}-{n}", role, "cpu", cpus=(cores[i % len(cores)],))
        for i, (n, role) in enumerate(_numbered(roles))
    ]


def _numbered(roles: list[Role]) -> list[tuple[int, Role]]:
    seen: dict[Role, int] = {}
    numbered = []
    for role in roles:
        numbered.append((seen.get(role, 0), role))
        seen[role] = seen.get(role, 0) + 1
    return numbered


def _own_first(gpus: list[str], index: int) -> tuple[str, ...]:
    """A peer's GPU has to be visible to open its memory, so every worker sees all of them."""
    return (gpus[index], *(g for i, g in enumerate(gpus) if i != index))


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, found without loading CUDA."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name.strip() for name in allowed.split(",") if name.strip() not in ("", "-1")]
    minors = Path("/proc/driver/nvidia/gpus")
    if not minors.is_dir():
        return []
    return [str(i) for i in range(len(list(minors.iterdir())))]


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
        cpus=list(placement.cpus),
        environment=environment,
        engine_args=_engine_args(config, placement, model_dir),
        lease_ttl_s=config.lease_ttl,
        fake=config.fake_engine,
    )


def _engine_args(
    config: ServeConfig, placement: Placement, model_dir: str
) -> dict[str, str | int | float | bool]:
    arguments: dict[str, str | int | float | bool] = {
        "dtype": config.dtype,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_num_seqs),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enforce_eager": config.enforce_eager,
        "trust_remote_code": config.trust_remote_code,
        "seed": config.seed,
    }
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if config.block_size is not None:
        arguments["block_size"] = config.block_size
    kv_bytes = config.kv_cache_memory_bytes
    if kv_bytes is None and placement.device == "cpu" and config.engine == "vllm":
        kv_bytes = default_cpu_kv_bytes(config, model_dir)
    if kv_bytes is not None:
        arguments["kv_cache_memory_bytes"] = kv_bytes
    return arguments


def default_cpu_kv_bytes(config: ServeConfig, model_dir: str) -> int:
    """KV bytes of one CPU worker: room for two longest requests, within a quarter of the memory."""
    model = json.loads((Path(model_dir) / "config.json").read_text())
    model = model.get("text_config", model)
    heads = model.get("num_attention_heads", 1)
    head_dim = model.get("head_dim") or model.get("hidden_size", 1) // heads
    kv_heads = model.get("num_key_value_heads") or heads
    bytes_per_token: int = 2 * 2 * model.get("num_hidden_layers", 1) * kv_heads * head_dim
    longest: int = config.max_model_len or model.get("max_position_embeddings", 4096)
    wanted = max(CPU_KV_BYTES, 2 * longest * bytes_per_token)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(wanted, memory // 4 // config.num_workers)
