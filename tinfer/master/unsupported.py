"""What vLLM could do and the split cannot, as far as the environment and config.json ask for it.

Engine arguments that do are refused with the options (`tinfer/engine_args.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinfer.errors import StartError

# The second is the newer name; torch reads both.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises `StartError` naming the variable that the workers cannot do with."""
    for name in _ALLOCATOR_VARIABLES:
        settings = environment.get(name, "").replace(" ", "").lower().split(",")
        if "expandable_segments:true" in settings:
            raise StartError(
                f"{name} has expandable_segments:True: such memory may move to other pages, and "
                "other processes map the KV blocks; take it out"
            )
    # As vLLM reads it: a number that is not 0.
    if environment.get(_RUNNER_VARIABLE, "").strip() not in ("", "0"):
        raise StartError(
            f"{_RUNNER_VARIABLE} asks for vLLM's model runner V2, whose logits processors are "
            "others than the one that forces the first token after a hand-off; unset it"
        )


def check_model(config: Mapping[str, Any]) -> None:
    """Raises `StartError` for a config.json that brings its own speculative decoding along."""
    if "speculators_config" in config:
        raise StartError(
            "config.json of the model has a speculators_config, and speculative decoding does not "
            "go with the logits processor that forces the first token after a hand-off; serve the "
            "model that it is for"
        )
