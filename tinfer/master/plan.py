"""The plan: which worker runs where, with how much memory, and why, decided before any process is
started and before a large file is downloaded."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pynvml
from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master import fit, hub, sizing, transport
from tinfer.master.conflicts import check_device_files
from tinfer.master.cores import CoreClaims
from tinfer.master.gpu_placement import on_gpus
from tinfer.master.gpus import Gpu, usable_gpus
from tinfer.master.host_cpu import SLOW_HALVES, halves_are_slow
from tinfer.master.host_memory import HostMemory, host_memory
from tinfer.master.model import Model, resolve
from tinfer.master.placement import Placement, on_cpu
from tinfer.master.unsupported import check_environment, check_model
from tinfer.tune.tuning import Tuning


class WorkerPlan(Struct, frozen=True, kw_only=True):
    """One worker of the plan.

    `role` is `prefill`, `decode` or `both`; `device` is `cuda` or `cpu`; `gpus` are the UUIDs of
    its own GPUs, `cores` its CPU cores and `threads` the threads of each rank on a CPU;
    `memory_share` is the part of each GPU's memory that it takes (null on a CPU); `weights_bytes`
    and `kv_bytes` are per rank, and an estimate on GPUs unless `--kv-cache-memory-bytes` is set;
    `kv_tokens` is how many tokens that KV holds (null where config.json does not tell).
    """

    id: str
    role: str
    device: str
    label: str
    gpus: tuple[str, ...]
    cores: tuple[int, ...]
    threads: int
    memory_share: float | None
    weights_bytes: int
    kv_bytes: int | None
    kv_tokens: int | None


class Plan(Struct, frozen=True, kw_only=True):
    """What `--dry-run --json` writes; its keys are these fields.

    `model` is the name clients use, `directory` where its files are or will be, `download_bytes`
    what is still to be downloaded; `dtype` is what an engine computes in; `weights_bytes` the
    weights once loaded, on all ranks of a worker together; `max_model_len` the longest request as
    asked or by config.json; `kv_bytes_per_token` is over all `tensor_parallel_size` ranks; `route`
    is as asked; `transport` what is expected to move KV blocks; `workers` are `WorkerPlan`s;
    `reasons` say in whole sentences why it is so.
    """

    model: str
    directory: str
    download_bytes: int
    dtype: str
    weights_bytes: int
    max_model_len: int
    kv_bytes_per_token: int
    tensor_parallel_size: int
    route: str
    transport: str
    workers: tuple[WorkerPlan, ...]
    reasons: tuple[str, ...]


class Decision(Struct, frozen=True):
    """The plan, and what the start makes of it; `tuning` is what was measured of its workers."""

    plan: Plan
    model: Model
    placements: list[Placement]
    tuning: Tuning | None = None


class Surroundings(Struct, frozen=True):
    """What a plan depends on besides the options."""

    claims: CoreClaims
    gpus: list[Gpu]
    memory: HostMemory
    halves_are_slow: bool = False


def look_around(config: ServeConfig, claims: CoreClaims, nvml: Any = pynvml) -> Surroundings:
    """This machine as the plan needs it. Raises `StartError` for GPUs that may not be used."""
    gpus: list[Gpu] = []
    if config.engine == "vllm":
        check_environment(os.environ)
        check_device_files()
        gpus = usable_gpus(nvml)
    if not gpus and (config.prefill_devices or config.decode_devices):
        raise StartError("--prefill-devices and --decode-devices: there is no GPU to be had")
    return Surroundings(claims, gpus, host_memory(), halves_are_slow())


def decide(config: ServeConfig, around: Surroundings) -> Decision:
    """Resolve the model and place its workers. Raises `StartError` for all that cannot work."""
    model = resolve(config)
    check_model(model.config)
    shape = sizing.read_shape(model.config)
    sizing.check_splits(shape, config.tensor_parallel_size)
    if model.hub is not None:
        hub.check_disk(model.hub)
    needs = fit.Needs.of(config, shape, model.weights)
    if around.gpus:
        return _on_gpus(config, around, model, needs)
    return _on_cpu(config, around, model, needs)


def _on_gpus(config: ServeConfig, around: Surroundings, model: Model, needs: fit.Needs) -> Decision:
    def dtype_of(gpu: Gpu) -> str:
        return sizing.resolve_dtype(config.dtype, needs.shape, gpu.capability)

    layout = on_gpus(config, around.gpus, dtype_of)
    dtypes = [dtype_of(group[0]) for group in layout.groups]
    room = fit.kv_bytes_on_gpus(config, needs, layout, around.gpus, dtypes)
    placements = layout.placements
    if len({p.own_devices for p in placements}) < len(placements):
        # Workers that start together on one GPU would measure each other's memory.
        placements = [
            msgspec.structs.replace(p, kv_bytes=kv_bytes)
            for p, kv_bytes in zip(placements, room, strict=True)
        ]
    return Decision(
        _plan(config, model, needs, placements, dtypes[0], room, layout.reasons), model, placements
    )


def _on_cpu(config: ServeConfig, around: Surroundings, model: Model, needs: fit.Needs) -> Decision:
    is_fake = config.engine == "fake"
    num_threads = 1 if model.is_built_in or is_fake else None
    claims = around.claims
    placements = on_cpu(config, config.cpu_threads or num_threads, claims)
    reasons = ["the fake engine needs no GPU" if is_fake else "no GPU to be had: CPU cores"]
    if config.cpu_threads is None and model.is_built_in:
        reasons.append("one thread per worker is fastest for the built-in model")
    elif config.cpu_threads is None and not is_fake:
        reasons.append(
            f"{claims.num_usable} usable cores over {len(placements)} workers: "
            f"{_threads(placements[0].num_threads)} each"
        )
    reasons += claims.notes
    dtype = sizing.resolve_dtype(config.dtype, needs.shape, None)
    if not is_fake and around.halves_are_slow and dtype in ("bfloat16", "float16"):
        reasons.append(SLOW_HALVES)
    room: list[int] = []
    if not is_fake:
        kv_bytes = fit.kv_bytes_on_cpu(config, needs, dtype, len(placements), around.memory)
        room = [kv_bytes] * len(placements)
        placements = [msgspec.structs.replace(p, kv_bytes=kv_bytes) for p in placements]
    return Decision(
        _plan(config, model, needs, placements, dtype, room, reasons), model, placements
    )


def _plan(
    config: ServeConfig,
    model: Model,
    needs: fit.Needs,
    placements: list[Placement],
    dtype: str,
    room: list[int],
    reasons: list[str],
) -> Plan:
    size = config.tensor_parallel_size
    kv_dtype = needs.kv_dtype(dtype)
    per_rank = sizing.kv_bytes_per_token_and_rank(needs.shape, kv_dtype, size)
    weights = needs.weights_bytes(dtype)
    if model.hub is not None and model.hub.note:
        reasons = [*reasons, model.hub.note]
    return Plan(
        model=model.names[0],
        directory=model.directory,
        download_bytes=model.hub.missing_bytes if model.hub else 0,
        dtype=dtype,
        weights_bytes=weights,
        max_model_len=needs.max_model_len,
        kv_bytes_per_token=sizing.kv_bytes_per_token(needs.shape, kv_dtype),
        tensor_parallel_size=size,
        route=config.route,
        transport=transport.expect(config, placements),
        workers=tuple(
            WorkerPlan(
                id=p.worker_id,
                role=p.role.value,
                device=p.device,
                label=p.label,
                gpus=p.own_devices,
                cores=p.cpus,
                threads=p.num_threads,
                memory_share=p.memory_share,
                weights_bytes=weights // size,
                kv_bytes=room[i] if room else None,
                kv_tokens=room[i] // per_rank if room and per_rank else None,
            )
            for i, p in enumerate(placements)
        ),
        reasons=tuple(reasons),
    )


def text_of(plan: Plan) -> str:
    """The plan for a reader."""
    lines = [
        f"plan for {plan.model} in {plan.directory}",
        f"  {'model':<9} {plan.dtype}, {fit.gib(plan.weights_bytes)} of weights, up to "
        f"{plan.max_model_len} tokens per request",
    ]
    if plan.download_bytes:
        lines.append(f"  {'download':<9} {hub.gb(plan.download_bytes)} from the hub")
    width = max(len(worker.id) for worker in plan.workers)
    for i, worker in enumerate(plan.workers):
        head = "workers" if i == 0 else ""
        lines.append(f"  {head:<9} {worker.id:<{width}}  {_worker_text(worker, plan)}")
    lines.append(f"  {'hand-off':<9} {plan.transport}")
    lines += [f"  {'why' if i == 0 else '':<9} {r}" for i, r in enumerate(plan.reasons)]
    return "\n".join(lines)


def _worker_text(worker: WorkerPlan, plan: Plan) -> str:
    each = " on each" if plan.tensor_parallel_size > 1 else ""
    parts = [worker.label]
    if worker.device == "cpu":
        ranks = f"{plan.tensor_parallel_size} ranks of " if plan.tensor_parallel_size > 1 else ""
        parts.append(f"{ranks}{_threads(worker.threads)}")
    elif worker.memory_share is not None:
        parts.append(f"{worker.memory_share:.0%} of the memory")
    if worker.kv_bytes is not None:
        about = "about " if worker.device == "cuda" else ""
        tokens = f" ({worker.kv_tokens} tokens)" if worker.kv_tokens is not None else ""
        parts.append(f"{about}{fit.gib(worker.kv_bytes)} KV cache{each}{tokens}")
    return ", ".join(parts)


def _threads(num_threads: int) -> str:
    return f"{num_threads} thread{'s' * (num_threads > 1)}"
