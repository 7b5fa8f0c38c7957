"""The options of `tinfer serve`, each declared once: name, type, bounds, default, meaning.

The command line and `--help` are derived from this struct. Names are those of `vllm serve` where
the meaning is the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tinfer.errors import StartError

Positive = Annotated[int, Meta(ge=1)]


class ServeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What one server does; never changed after the start."""

    model: Annotated[
        str | None,
        Meta(description="Directory of a Hugging Face model, or its name (org/name) on the hub."),
    ] = None
    revision: Annotated[
        str | None, Meta(description="Branch, tag or commit of a model from the hub.")
    ] = None
    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port; 0 takes a free one.")] = 8000
    served_model_name: Annotated[
        tuple[str, ...],
        Meta(description="Name(s) that clients use; the first is reported. Default: MODEL."),
    ] = ()

    prefill: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Number of prefill workers. Default: half of the GPUs; 1 on a CPU."),
    ] = None
    decode: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Number of decode workers. Default: the GPUs that are left; 1 on a CPU."),
    ] = None
    prefill_devices: Annotated[
        str | None,
        Meta(description="GPUs of the prefill workers: indices or UUIDs, comma-separated."),
    ] = None
    decode_devices: Annotated[
        str | None,
        Meta(description="GPUs of the decode workers: indices or UUIDs, comma-separated."),
    ] = None
    route: Annotated[
        Literal["auto", "split", "whole"],
        Meta(
            description="split: prefill and decode on two workers; whole: on one; "
            "auto: decided per request (today the same as split)."
        ),
    ] = "auto"
    kv_transport: Annotated[
        Literal["auto", "cuda-ipc", "host", "shm"],
        Meta(description="How KV blocks move; auto takes what a probe shows to work."),
    ] = "auto"
    prefill_policy: Annotated[
        Literal["fcfs"], Meta(description="Order in which queued prompts are prefilled.")
    ] = "fcfs"
    decode_policy: Annotated[
        Literal["least-loaded"], Meta(description="How a decode worker is chosen.")
    ] = "least-loaded"
    admission: Annotated[
        Literal["greedy"], Meta(description="When a decode worker takes a request.")
    ] = "greedy"

    tensor_parallel_size: Annotated[
        Positive, Meta(description="GPUs (or groups of CPU cores) that share one worker's model.")
    ] = 1
    cpu_threads: Annotated[
        Positive | None,
        Meta(description="CPU threads of a rank. Default: equal shares; 1 for the built-in model."),
    ] = None

    dtype: Annotated[
        Literal["auto", "half", "float16", "bfloat16", "float", "float32"],
        Meta(description="Data type of weights and activations."),
    ] = "auto"
    max_model_len: Annotated[
        Positive | None, Meta(description="Longest prompt plus answer. Default: the model's.")
    ] = None
    max_num_seqs: Annotated[Positive, Meta(description="Sequences per worker and step.")] = 256
    max_num_batched_tokens: Annotated[
        Positive,
        Meta(description="Tokens per worker and step: the size of a prefill chunk."),
    ] = 512
    block_size: Annotated[
        Positive | None, Meta(description="Tokens per KV block. Default: vLLM's choice.")
    ] = None
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="Share of a GPU's memory for one worker.")
    ] = 0.9
    kv_cache_memory_bytes: Annotated[
        Positive | None, Meta(description="KV cache on each rank of a worker. Default: by device.")
    ] = None
    enable_prefix_caching: Annotated[
        bool, Meta(description="Reuse KV blocks of equal prompt prefixes.")
    ] = True
    enforce_eager: Annotated[bool, Meta(description="No CUDA graphs (always so on a CPU).")] = False
    trust_remote_code: Annotated[
        bool, Meta(description="Run code that the model's directory brings along.")
    ] = False
    seed: Annotated[int, Meta(description="Seed of the engines' own random generators.")] = 0

    chat_template: Annotated[
        str | None, Meta(description="Chat template: a file, or the template itself.")
    ] = None
    strict_params: Annotated[
        bool, Meta(description="Answer unknown request fields with 400 instead of ignoring them.")
    ] = False
    max_num_queued_reqs: Annotated[
        Positive, Meta(description="Queued requests beyond which new ones get 429.")
    ] = 4096
    shutdown_timeout: Annotated[
        float,
        Meta(ge=0, description="Seconds that running requests get to finish after a stop signal."),
    ] = 30.0
    start_timeout: Annotated[
        float, Meta(gt=0, description="Seconds that a worker gets to become ready.")
    ] = 600.0
    lease_ttl: Annotated[
        float, Meta(gt=0, description="Seconds before a held block's owner asks about its reader.")
    ] = 10.0
    max_worker_restarts: Annotated[
        int, Meta(ge=0, description="Deaths in a row after which a worker is given up.")
    ] = 5
    log_dir: Annotated[
        str | None, Meta(description="Keep the workers' logs here. Default: with the sockets.")
    ] = None
    verbose: Annotated[bool, Meta(description="Log every request's way (never its text).")] = False
    engine: Annotated[
        Literal["vllm", "fake"],
        Meta(description="fake: no model, seeded nonsense at set speeds, to test the server."),
    ] = "vllm"
    fake_engine: Annotated[
        dict[str, float], Meta(description="Settings of the fake engine, name=value.")
    ] = {}


def load(values: dict[str, Any]) -> ServeConfig:
    """A checked configuration from plain values. Raises `StartError` naming what is wrong."""
    try:
        config = msgspec.convert(values, ServeConfig)
    except msgspec.ValidationError as error:
        raise StartError(f"bad option: {error}") from error
    if config.prefill == config.decode == 0:
        raise StartError("no worker: --prefill and --decode are both 0")
    if config.route == "split" and 0 in (config.prefill, config.decode):
        raise StartError("--route split needs at least one --prefill and one --decode worker")
    return config
