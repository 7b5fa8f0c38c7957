"""Which model is served: from what the user wrote to its files, names and sizes.

Nothing large is read or downloaded here: `Model.hub` says what is still to come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master import hub
from tinfer.master.model_files import Weights, local_weights, read_config
from tinfer.tiny_model import MODEL_DIR

BUILT_IN_NAME = "tinfer-tiny"


class Model(Struct, frozen=True):
    """A model as found. `names` are those it is served under; `hub` is set for a name of the hub,
    and then `directory` is complete only once its missing files are there."""

    directory: str
    names: tuple[str, ...]
    config: dict[str, Any]
    weights: Weights
    is_built_in: bool = False
    hub: hub.HubModel | None = None


def resolve(config: ServeConfig) -> Model:
    """Find the model. Raises `StartError` if MODEL is neither the directory of a complete Hugging
    Face model nor a name on the hub (or in its cache) that this user may read."""
    if config.model is None:
        if config.revision is not None:
            raise StartError("--revision is for models of the hub, and no MODEL is given")
        return _local(MODEL_DIR, BUILT_IN_NAME, config, is_built_in=True)
    path = Path(config.model).expanduser()
    if path.is_dir():
        if config.revision is not None:
            raise StartError("--revision is for models of the hub, and MODEL is a directory")
        return _local(path.resolve(), config.model, config)
    if not hub.is_hub_name(config.model):
        raise StartError(f"no such model directory (nor a hub's org/name): {config.model}")
    found = hub.look(config.model, config.revision, config.trust_remote_code)
    return Model(
        found.directory,
        config.served_model_name or (config.model,),
        read_config(Path(found.directory), config.model),
        found.weights,
        hub=found,
    )


def _local(path: Path, name: str, config: ServeConfig, is_built_in: bool = False) -> Model:
    return Model(
        str(path),
        config.served_model_name or (name,),
        read_config(path, name),
        local_weights(path),
        is_built_in,
    )
