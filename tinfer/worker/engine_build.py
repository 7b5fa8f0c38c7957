"""Builds a vLLM engine in this process, with our connector, scheduler and logits processor."""

from __future__ import annotations

import os
from typing import Any

from vllm import LLMEngine
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from tinfer.wire.control import WorkerSpec
from tinfer.worker.eager import compute_eagerly
from tinfer.worker.engine_arguments import converted, engine_hints
from tinfer.worker.environment import VLLM_ENVIRONMENT
from tinfer.worker.model_inspection import inspect_in_this_process
from tinfer.worker.ranks.build import RanksOf
from tinfer.worker.seeded_chunks import patch_cpu_runner
from tinfer.worker.threads import set_threads

CONNECTOR_MODULE = "tinfer.worker.connector"
CONNECTOR_CLASS = "TinferConnector"
SCHEDULER = "tinfer.worker.engine_scheduler.EngineScheduler"
FORCE_TOKENS = "tinfer.worker.first_token:ForceTokens"


class UnsupportedModel(Exception):
    """The model has a KV cache that the hand-off cannot move; the message says which."""


def build_engine(spec: WorkerSpec, wake_path: str) -> LLMEngine:
    """An engine as `spec` asks, its KV memory allocated and exportable.

    `wake_path` opens the pipe that the connector writes to when a pull ends. Raises whatever vLLM
    raises, `UnsupportedModel` for KV caches other than full attention and for what vLLM does only
    in other ways than the hand-off knows, `UnfitArgument`, and `RanksFailed`.
    """
    os.environ.update(VLLM_ENVIRONMENT)
    inspect_in_this_process()
    if spec.tensor_parallel_size > 1:
        with RanksOf(spec) as ranks:
            return _built(_engine_args(spec, wake_path, ranks))
    if spec.device == "cpu":
        compute_eagerly()
        patch_cpu_runner()
        set_threads(spec.num_threads)
    return _built(_engine_args(spec, wake_path, None))


def _built(arguments: EngineArgs) -> LLMEngine:
    """What cannot be served is refused before anything is loaded."""
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    if config.speculative_config is not None:
        raise UnsupportedModel("this model speculates by itself, which is not supported")
    if config.use_v2_model_runner:
        raise UnsupportedModel("this model forces vLLM's model runner V2, which is not supported")
    return LLMEngine.from_vllm_config(
        config, UsageContext.ENGINE_CONTEXT, disable_log_stats=arguments.disable_log_stats
    )


def _engine_args(spec: WorkerSpec, wake_path: str, ranks: RanksOf | None) -> EngineArgs:
    own: dict[str, Any] = {
        "model": spec.model_dir,
        "kv_transfer_config": KVTransferConfig(
            kv_connector=CONNECTOR_CLASS,
            kv_connector_module_path=CONNECTOR_MODULE,
            kv_role="kv_both",
            engine_id=f"{spec.worker_id}.{spec.generation}",
            # A block that cannot be read is computed again; "fail" would end the request.
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "worker_id": spec.worker_id,
                "generation": spec.generation,
                "transport": spec.kv_transport,
                "wake_path": wake_path,
                "lease_ttl_s": spec.lease_ttl_s,
                **({} if ranks is None else ranks.connector_config()),
            },
        ),
        "logits_processors": [FORCE_TOKENS],
        "scheduler_cls": SCHEDULER,
        # The connector's bookkeeping, the prefill budget and the loop's idea of an idle step follow
        # the step that has just run; with asynchronous scheduling they would be one step behind.
        "async_scheduling": False,
        "disable_log_stats": True,
        # The API applies the model's generation_config.json; the engine must not do it again.
        "generation_config": "vllm",
    }
    if spec.device == "cpu":
        # One engine owns its cores: compiling for it costs more than it brings, and an explicit KV
        # size skips vLLM's profiling run.
        own["enforce_eager"] = True
    if ranks is not None:
        own |= ranks.engine_args()
    return EngineArgs(**{**converted(spec.engine_args, engine_hints()), **own})
