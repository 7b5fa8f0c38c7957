"""Lets a worker look at a model's class without starting another Python.

Before it loads a model that it has not seen on this machine, vLLM imports the model's class in a
fresh interpreter, so as not to initialise CUDA where a process may still fork. A worker never forks
and is about to initialise CUDA itself, and the fresh interpreter costs as much as a whole start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vllm.model_executor.models import registry

T = TypeVar("T")


def inspect_in_this_process() -> None:
    """Replace the detour; idempotent. vLLM versions without it are left alone."""
    module: Any = registry
    if hasattr(module, "_run_in_subprocess"):
        module._run_in_subprocess = _run_here


def _run_here(inspect: Callable[[], T]) -> T:
    return inspect()
