"""What `tinfer tune` has measured of the workers of a plan, if it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinfer.config import ServeConfig
from tinfer.master.gpus import Gpu, usable_gpus
from tinfer.master.plan import Decision
from tinfer.tune.identity import CONFIG_NAME, Identity, identity_of
from tinfer.tune.store import load_for
from tinfer.tune.tuning import Tuning


def worker_identity(config: ServeConfig, decision: Decision, gpus: Sequence[Gpu]) -> Identity:
    """Of the first worker of the plan, which stands for all. Raises `StartError`."""
    placement = decision.placements[0]
    own = placement.own_devices
    return identity_of(
        gpu_model=next((gpu.model for gpu in gpus if gpu.uuid in own), None),
        num_threads=placement.num_threads,
        directory=Path(decision.model.directory),
        weights_bytes=decision.model.weights.num_bytes,
        dtype=decision.plan.dtype,
        tensor_parallel_size=placement.tensor_parallel_size,
        enforce_eager=config.enforce_eager,
        is_fake=config.engine == "fake",
    )


def gpus_of(config: ServeConfig) -> list[Gpu]:
    """The GPUs that the plan could use; none for the fake engine."""
    return [] if config.engine == "fake" else usable_gpus()


def stored_tuning(config: ServeConfig, decision: Decision, gpus: Sequence[Gpu]) -> Tuning | None:
    """The stored measurement of this device, model and way to compute; None where there is none,
    as for a model that is still to be downloaded, and for workers that compute in a way that is
    never measured."""
    if config.quantization or config.kv_cache_dtype != "auto" or config.engine_arg:
        return None
    if not (Path(decision.model.directory) / CONFIG_NAME).exists():
        return None
    return load_for(worker_identity(config, decision, gpus))
