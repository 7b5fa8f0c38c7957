"""Which model is served: from what the user wrote to a local directory."""

from __future__ import annotations

from pathlib import Path

from tinfer.config import ServeConfig
from tinfer.errors import StartError

BUILT_IN_NAME = "tinfer-tiny"


def resolve(config: ServeConfig) -> tuple[str, tuple[str, ...]]:
    """The model's directory and the names it is served under.

    Raises `StartError` if MODEL is not a directory of a Hugging Face model.
    """
    if config.model is None:
        from tinfer.tiny_model.make import ensure_tiny_model

        return str(ensure_tiny_model()), config.served_model_name or (BUILT_IN_NAME,)
    path = Path(config.model).expanduser()
    if not path.is_dir():
        raise StartError(f"no such model directory: {config.model}")
    if not (path / "config.json").is_file():
        raise StartError(f"not a Hugging Face model, config.json is missing: {config.model}")
    return str(path.resolve()), config.served_model_name or (config.model,)
