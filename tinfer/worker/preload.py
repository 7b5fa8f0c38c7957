"""The imports that every vLLM worker needs, done once in the zygote.

vllm comes first: it sets up what the libraries below it read at import. Modules that the engine
imports lazily while it starts are named here, because each of them would otherwise be imported
again by every worker.
"""

from __future__ import annotations

import importlib
import logging
import os

from tinfer.worker.environment import VLLM_ENVIRONMENT

log = logging.getLogger(__name__)

# Imported by vLLM when an engine starts, not when vllm is imported (found by comparing sys.modules
# before and after a start).
_LAZY_MODULES = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader",
    "vllm.v1.structured_output",
    "vllm.v1.sample.logits_processor.builtin",
    "vllm.renderers.hf",
    "vllm.lora.resolver",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.pool.flash_maxsim",
    "vllm.triton_utils.dispatcher",
    "tinfer.worker.connector",
    "tinfer.worker.engine",
    "tinfer.worker.engine_arguments",
    "tinfer.worker.engine_scheduler",
    "tinfer.worker.process",
)


def preload() -> None:
    """Import vllm and what its engine will import, but for what another version lacks."""
    os.environ.update(VLLM_ENVIRONMENT)
    importlib.import_module("vllm")
    import vllm.platforms

    names = list(_LAZY_MODULES)
    if vllm.platforms.current_platform.is_cpu():
        names += [
            "vllm.v1.worker.cpu_worker",
            "vllm.v1.attention.backends.cpu_attn",
            "vllm.utils.cpu_triton_utils",
            "tinfer.worker.ranks.rank_cpu",
        ]
    else:
        names.append("vllm.v1.worker.gpu_worker")
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            log.warning("cannot preload %s", name)
