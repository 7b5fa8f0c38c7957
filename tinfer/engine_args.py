"""Which of vLLM's engine arguments a user may pass on (`--engine-arg`), and why not the others.

Names are those of vLLM 0.32's `EngineArgs`. That a name exists and a value fits is found out where
vLLM is imported anyway (`worker/engine_arguments.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_RUNNER_V2 = (
    "it forces vLLM's model runner V2, whose logits processors are others than the one that "
    "forces the first token after a hand-off"
)
# Reasons with the arguments that they are for. What is an option of `tinfer serve` by the same name
# is refused as well.
_REASONS = (
    ("MODEL says it: `tinfer serve MODEL`, or `model` in a file", "model model_weights"),
    (
        "the master tokenises with the model's own tokenizer, and the workers have to agree",
        "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init",
    ),
    ("the environment says it: HF_TOKEN", "hf_token"),
    ("the environment says it: HF_HUB_CACHE", "download_dir"),
    ("only text generation is served", "runner convert pooler_config"),
    (
        "tinfer moves KV blocks itself",
        "kv_transfer_config ec_transfer_config kv_offloading_size kv_offloading_backend",
    ),
    ("tinfer's own forces the first token after each hand-off", "logits_processors"),
    (
        "what a step computes is tinfer's own scheduler's matter",
        "scheduler_cls scheduling_policy async_scheduling",
    ),
    (
        "prompts are always computed in chunks: --chunk-size",
        "enable_chunked_prefill max_num_scheduled_tokens",
    ),
    ("use --max-num-seqs", "max_num_active_seqs"),
    ("each step's tokens leave with it, and with their text", "stream_interval tokens_only"),
    (
        "the API applies the model's generation_config.json",
        "generation_config override_generation_config",
    ),
    ("/debug/state has the figures", "disable_log_stats"),
    (
        "the master reads answers with the same parser, and both have vLLM's own only",
        "reasoning_parser_plugin",
    ),
    (
        "tinfer places its workers itself: --prefill-devices, --decode-devices",
        "distributed_executor_backend worker_cls worker_extension_cls device device_ids nnodes "
        "node_rank master_addr master_port numa_bind numa_bind_nodes numa_bind_cpus",
    ),
    (
        "no speculative decoding: a hand-off forces the first token by a logits processor, with "
        "which vLLM does not speculate",
        "speculative_config spec_method spec_model spec_tokens",
    ),
    (
        "no sleep mode: other processes map the KV memory, and what CUDA allocates for sleeping "
        "cannot be shared so",
        "enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names "
        "enable_cumem_allocator enable_nccl_comm_suspend",
    ),
    (
        "no pipeline parallelism: every worker computes all layers; --tensor-parallel-size splits "
        "each of them",
        "pipeline_parallel_size",
    ),
    (
        "no data parallelism inside a worker: more workers are it, --prefill and --decode",
        "data_parallel_size data_parallel_rank data_parallel_start_rank data_parallel_size_local "
        "data_parallel_address data_parallel_rpc_port data_parallel_hybrid_lb "
        "data_parallel_external_lb data_parallel_multi_port_external_lb data_parallel_backend",
    ),
    (
        "no context parallelism: a hand-off copies whole blocks, rank by rank",
        "prefill_context_parallel_size decode_context_parallel_size",
    ),
    (
        _RUNNER_V2,
        "watermark_config diffusion_config aux_output_config enable_trace_replay "
        "return_sampling_mask enable_return_routed_experts",
    ),
    (
        "no LoRA adapters",
        "enable_lora max_loras max_lora_rank max_cpu_loras fully_sharded_loras lora_dtype "
        "lora_target_modules default_mm_loras",
    ),
)
_REFUSED = {name: reason for reason, names in _REASONS for name in names.split()}
REFUSED_NAMES = tuple(_REFUSED)
# Within an argument that takes an object: the keys that ask for what is refused.
_REFUSED_KEYS = {
    ("attention_config", "hisparse_config"): _RUNNER_V2,
    ("structured_outputs_config", "reasoning_parser"): "use tinfer's own --reasoning-parser",
}


def plain_name(written: str) -> str:
    """vLLM's name of an argument as a user may write it: `--max-logprobs` is max_logprobs."""
    return written.strip().lstrip("-").replace("-", "_")


def refusal(name: str, value: Any, options: Iterable[str]) -> str | None:
    """Why the engine argument is not passed on; None if it is.

    `options` are the names of tinfer's own options.
    """
    if name in _REFUSED:
        return _REFUSED[name]
    if name in options:
        return f"use tinfer's own --{name.replace('_', '-')}"
    for (outer, key), reason in _REFUSED_KEYS.items():
        if name == outer and isinstance(value, dict) and key in value:
            return f"{key}: {reason}"
    return None


def why_no_option(flag: str) -> str | None:
    """Why `tinfer serve` does not have that flag of `vllm serve`; None if it is none."""
    return _REFUSED.get(plain_name(flag.removeprefix("--no-")))
