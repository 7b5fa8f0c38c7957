"""The arms of a comparison, and the servers of each: command lines as data, nothing is started.

Equal in every arm: devices, cores, threads per engine, KV bytes per device, data type, block size,
prefix caching, sequences per step (but for `paper`), model length, CUDA graphs or none, and the
sampling defaults of the model, which all servers take. On CPU the engine of worker or
replica i computes on the i-th group of cores with one thread each, and every front end (tinfer's
master, vLLM's API servers) and the client may run on all of these cores and no others. vLLM's
engine runs in the process that vLLM forks for it without a further worker process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`), its fastest shape on CPU, and eagerly, as tinfer's do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from msgspec import Struct

from tinfer.bench.compare.options import CompareOptions
from tinfer.config import ServeConfig

Kind = Literal["tinfer-auto", "tinfer-split", "tinfer-whole", "replicas", "replicas-512", "paper"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REPLICAS: tuple[Kind, ...] = ("replicas", "replicas-512")
SERVED_NAME = "compared"
CHUNK_TOKENS = 512
# Source: the paper's figures fit a batch of 16 sequences (arXiv 2401.11181, section 5.2.1).
PAPER_NUM_SEQS = 16
# They would change what every arm is given alike; a key would lock this client out of some arms.
NEVER_INHERITED = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    *(f"TINFER_{name.upper()}" for name in ("config", *ServeConfig.__struct_fields__)),
    "VLLM_API_KEY",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
)


class Arm(Struct, frozen=True):
    """One side of the comparison; the same kind may be there twice under two names."""

    name: str
    kind: Kind

    @property
    def is_tinfer(self) -> bool:
        return self.kind.startswith("tinfer")

    @property
    def is_replicas(self) -> bool:
        return self.kind in REPLICAS


class ServerPlan(Struct, frozen=True, kw_only=True):
    """One server process: `argv` lacks only the port, which is drawn when it starts.

    `devices` are the places, from 0, of the devices it computes on. `engine_cores` are the cores it
    starts on, None where nothing binds it; `front_cores` those of its front end once it is ready.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    devices: tuple[int, ...]
    engine_cores: tuple[int, ...] | None = None
    front_cores: tuple[int, ...] | None = None


def parse_arms(text: str) -> tuple[Arm, ...]:
    """`KIND` or `KIND=NAME`, comma-separated. Raises `ValueError`."""
    arms = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        kind, _, name = word.partition("=")
        known = next((one for one in KINDS if one == kind), None)
        if known is None:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        arms.append(Arm(name or kind, known))
    names = [arm.name for arm in arms]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two arms are called {min(repeated)}; name them KIND=NAME")
    if not any(arm.is_replicas for arm in arms):
        raise ValueError(f"unloaded times need a plain replica: add {' or '.join(REPLICAS)}")
    return tuple(arms)


def default_arms() -> tuple[Arm, ...]:
    """Every kind once."""
    return tuple(Arm(kind, kind) for kind in KINDS)


def servers_of(arm: Arm, options: CompareOptions) -> tuple[ServerPlan, ...]:
    """What has to run for this arm."""
    if arm.is_tinfer:
        return (_tinfer(arm, options),)
    if arm.kind == "paper":
        return (_paper(options),)
    return tuple(_replica(arm, options, place) for place in range(options.num_workers))


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What a server takes over of this process's environment."""
    return {name: value for name, value in environment.items() if name not in NEVER_INHERITED}


def _tinfer(arm: Arm, options: CompareOptions) -> ServerPlan:
    num_prefill = max(1, options.num_workers // 2)
    argv = [
        *(sys.executable, "-m", "tinfer", "serve", options.model, "--host", "127.0.0.1"),
        *("--route", arm.kind.removeprefix("tinfer-")),
        *("--prefill", str(num_prefill), "--decode", str(options.num_workers - num_prefill)),
        *_equal(options, options.max_num_seqs),
    ]
    if options.device == "cpu":
        argv += ["--cpu-threads", str(options.threads)]
    everything = tuple(range(options.num_workers))
    return ServerPlan(
        argv=(*argv, *options.tinfer_args),
        environment=_gpus(options, everything),
        devices=everything,
        # tinfer binds each of its workers itself, within what it may run on.
        engine_cores=options.cores or None,
    )


def _replica(arm: Arm, options: CompareOptions, place: int) -> ServerPlan:
    chunk = ["--max-num-batched-tokens", str(CHUNK_TOKENS)] if arm.kind == "replicas-512" else []
    cores = options.cores
    if options.device == "cpu":
        cores = cores[place * options.threads : (place + 1) * options.threads]
    return ServerPlan(
        argv=(*_vllm(options, options.max_num_seqs, 1), *chunk, *options.vllm_args),
        environment=_vllm_environment(options, (place,), options.threads),
        devices=(place,),
        engine_cores=cores or None,
        front_cores=options.cores or None,
    )


def _paper(options: CompareOptions) -> ServerPlan:
    everything = tuple(range(options.num_workers))
    argv = [*_vllm(options, PAPER_NUM_SEQS, options.num_workers), "--no-enable-chunked-prefill"]
    if options.device == "cuda":
        argv += ["--tensor-parallel-size", str(options.num_workers)]
    return ServerPlan(
        argv=(*argv, *options.vllm_args),
        environment=_vllm_environment(options, everything, options.threads * options.num_workers),
        devices=everything,
        engine_cores=options.cores or None,
        front_cores=options.cores or None,
    )


def _vllm(options: CompareOptions, max_num_seqs: int, num_devices: int) -> list[str]:
    """On CPU one engine has the KV bytes of all its devices; on GPUs each rank has its own."""
    num_shares = num_devices if options.device == "cpu" else 1
    return [
        *(*options.vllm_command, "serve", options.model, "--host", "127.0.0.1"),
        *_equal(options, max_num_seqs, num_shares),
        # tinfer logs no statistics either.
        *("--disable-log-stats", "--disable-uvicorn-access-log"),
    ]


def _equal(options: CompareOptions, max_num_seqs: int, num_shares: int = 1) -> Iterable[str]:
    """What `tinfer serve` and `vllm serve` spell alike."""
    yield from ("--served-model-name", SERVED_NAME)
    yield from ("--kv-cache-memory-bytes", str(options.kv_cache_memory_bytes * num_shares))
    yield from ("--dtype", options.dtype, "--max-num-seqs", str(max_num_seqs))
    if options.block_size is not None:
        yield from ("--block-size", str(options.block_size))
    if options.max_model_len is not None:
        yield from ("--max-model-len", str(options.max_model_len))
    if options.enforce_eager or options.device == "cpu":
        yield "--enforce-eager"
    caching = "--enable-prefix-caching"
    yield caching if options.enable_prefix_caching else caching.replace("--", "--no-", 1)


def _vllm_environment(
    options: CompareOptions, devices: tuple[int, ...], num_threads: int
) -> dict[str, str]:
    environment = {"VLLM_NO_USAGE_STATS": "1", **_gpus(options, devices)}
    if options.device == "cpu":
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(num_threads)}
    return environment


def _gpus(options: CompareOptions, devices: tuple[int, ...]) -> dict[str, str]:
    if options.device == "cpu":
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(options.gpus[place] for place in devices)}
