"""What `tinfer bench compare` was asked for, checked. Which arms there are is `arms`' business."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from tinfer.errors import StartError
from tinfer.tiny_model import MODEL_DIR
from tinfer.workloads import WORKLOADS

Device = Literal["cpu", "cuda"]
# together: all arms are up at once, each idle but for its own runs. alone: one arm at a time.
Residency = Literal["together", "alone"]
DEFAULT_WORKLOADS = ("Mixed", "LPHD", "HPLD", "burst")
DEFAULT_LOADS = (0.5, 0.75, 0.95)
VLLM_COMMAND = (sys.executable, "-m", "vllm.entrypoints.cli.main")


class CompareOptions(Struct, frozen=True, kw_only=True):
    """Options of one comparison, by their flags' names; the arms are beside them.

    `num_workers` devices are compared: GPUs `gpus`, or on CPU as many groups of `threads` of the
    `cores`. `full_load`: requests/s that 100 % stands for, by workload, where it is not to be
    measured. `probe_s` is how long arrivals of one probe last. `baseline` None takes the better
    replica arm of each point. `restart_servers`: each repetition has servers of its own.
    """

    model: str = str(MODEL_DIR)
    workloads: tuple[str, ...] = DEFAULT_WORKLOADS
    loads: tuple[float, ...] = DEFAULT_LOADS
    repetitions: int = 5
    num_requests: int = 100
    seed: int = 0
    length_scale: float = 1.0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    baseline: str | None = None
    full_load: Mapping[str, float] = {}
    probe_s: float = 20.0
    num_unloaded: int = 7
    num_warmups: int = 8
    num_resamples: int = 1000
    device: Device = "cpu"
    num_workers: int = 2
    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    threads: int = 1
    residency: Residency = "together"
    restart_servers: bool = True
    kv_cache_memory_bytes: int = 512 << 20
    dtype: str = "auto"
    block_size: int | None = None
    max_num_seqs: int = 256
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    tinfer_args: tuple[str, ...] = ()
    vllm_args: tuple[str, ...] = ()
    vllm_command: tuple[str, ...] = VLLM_COMMAND
    start_timeout_s: float = 600.0
    json_path: str | None = None
    plot_dir: Path | None = None
    resume: bool = False
    save_detailed: bool = False
    log_dir: Path | None = None
    dry_run: bool = False


def with_devices(options: CompareOptions, usable: Iterable[int]) -> CompareOptions:
    """The options with their cores or GPUs named. Raises `StartError` where there are too few.

    `usable` are the cores this process may run on; options may name cores among them.
    """
    usable = sorted(usable)
    if options.num_workers < 2:
        raise StartError("a comparison needs at least two workers")
    if strange := sorted(set(options.cores) - set(usable)):
        raise StartError(f"core {strange[0]} is not one of {', '.join(map(str, usable))}")
    if options.device == "cuda":
        gpus = options.gpus or tuple(str(place) for place in range(options.num_workers))
        if len(gpus) != options.num_workers:
            raise StartError(f"{options.num_workers} workers need as many GPUs, not {len(gpus)}")
        return replace(options, gpus=gpus)
    wanted = options.num_workers * options.threads
    cores = options.cores or tuple(usable[:wanted])
    if len(cores) != wanted:
        raise StartError(
            f"{options.num_workers} workers of {options.threads} thread(s) need {wanted} cores, "
            f"and there are {len(cores)}"
        )
    return replace(options, cores=cores)


def device_for(num_workers: int) -> Device:
    """GPUs where the driver knows enough of them for so many workers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "cpu"
    try:
        return "cuda" if pynvml.nvmlDeviceGetCount() >= num_workers else "cpu"
    finally:
        pynvml.nvmlShutdown()


def usable_cores() -> set[int]:
    """Cores that this process may run on."""
    return os.sched_getaffinity(0)


def parse_workloads(text: str) -> tuple[str, ...]:
    """Comma-separated names. Raises `ValueError` for an unknown one."""
    names = tuple(dict.fromkeys(filter(None, (word.strip() for word in text.split(",")))))
    for name in names:
        if name not in WORKLOADS:
            raise ValueError(f"{name!r} is none of {', '.join(WORKLOADS)}")
    if not names:
        raise ValueError("no workload")
    return names


def parse_loads(text: str) -> tuple[float, ...]:
    """Comma-separated shares of the full load, above 0. Raises `ValueError`."""
    loads = tuple(dict.fromkeys(float(word) for word in text.split(",") if word.strip()))
    if not loads or not all(0 < load < 100 for load in loads):
        raise ValueError(f"{text!r}: loads are shares of the full load, as 0.5,0.75,0.95")
    return loads


def parse_rates(pairs: Iterable[str]) -> dict[str, float]:
    """`WORKLOAD=REQUESTS_PER_S` pairs. Raises `ValueError`."""
    rates = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        parse_workloads(name)
        rates[name] = float(text or "nan")
        if not 0 < rates[name] < float("inf"):
            raise ValueError(f"{pair!r} is not WORKLOAD=REQUESTS_PER_S")
    return rates


def parse_cores(text: str) -> tuple[int, ...]:
    """Comma-separated numbers and ranges, as `taskset -c` takes them. Raises `ValueError`."""
    cores: list[int] = []
    for word in text.split(","):
        first, _, last = word.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(cores))
