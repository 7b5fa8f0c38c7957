"""Whether torch and vLLM can be imported, as the import process of `tinfer serve` does it."""

from __future__ import annotations

import subprocess
import sys

import msgspec
from msgspec import Struct

from tinfer.doctor.finding import Finding, fault, ok, warning

# A first import from a cold disk reads gigabytes; later ones take a few seconds.
IMPORT_TIMEOUT_S = 120.0
# The version whose scheduler and connector interfaces the workers are written against.
# Source: the cpu and cuda extras in pyproject.toml.
VLLM_SERIES = "0.32"
CHECK = "engine"
_ADVICE = "run bin/setup again; it repairs what is missing"
# Runs in a process of its own, because this one must not load torch. The environment is the
# workers', which has to stand before vllm is imported.
_SCRIPT = """
import os, time
answer = os.dup(1)
os.dup2(2, 1)  # an import may print
started = time.monotonic()
from tinfer.worker.preload import preload
preload()
import json, torch, vllm, vllm.platforms
seen = {
    "import_s": time.monotonic() - started,
    "torch": torch.__version__,
    "vllm": vllm.__version__,
    "cuda": torch.version.cuda or "",
    "platform": vllm.platforms.current_platform.device_type,
    "num_gpus": torch.cuda.device_count() if torch.version.cuda else 0,
    "num_tasks": len(os.listdir("/proc/self/task")),
}
os.write(answer, json.dumps(seen).encode())
"""


class Imported(Struct, frozen=True):
    """What the import came to. `error` says why it failed; `num_tasks` are threads that the
    imports left running, of which a process that forks may have one only."""

    import_s: float = 0.0
    torch: str = ""
    vllm: str = ""
    cuda: str = ""
    platform: str = ""
    num_gpus: int = 0
    num_tasks: int = 1
    error: str = ""


def check_engine(imported: Imported, num_gpus: int) -> Finding:
    """`num_gpus` is what NVML lists and CUDA_VISIBLE_DEVICES leaves."""
    if imported.error:
        return fault(CHECK, f"torch and vLLM cannot be imported: {imported.error}", _ADVICE)
    build = f"CUDA {imported.cuda}" if imported.cuda else "CPU build"
    words = (
        f"vLLM {imported.vllm} on torch {imported.torch} ({build}), "
        f"imported in {imported.import_s:.1f} s"
    )
    if not imported.vllm.startswith(f"{VLLM_SERIES}."):
        return fault(CHECK, words, f"tinfer is written for vLLM {VLLM_SERIES}: {_ADVICE}")
    if num_gpus and not imported.cuda:
        return warning(
            CHECK, f"{words}; it cannot use the {num_gpus} GPUs", "bin/setup --device cuda"
        )
    if imported.cuda and imported.num_gpus < num_gpus:
        return fault(
            CHECK,
            f"{words}; torch sees {imported.num_gpus} of {num_gpus} GPUs",
            "see the GPU lines above; python -c 'import torch; torch.cuda.init()' says more",
        )
    if imported.cuda and not num_gpus and imported.platform != "cpu":
        return fault(CHECK, f"{words}, but there is no GPU", "bin/setup --device cpu")
    if imported.num_tasks > 1:
        return warning(
            CHECK,
            f"{words}; the imports leave {imported.num_tasks} threads",
            "workers are spawned, not forked, and start slower; it happens where OMP_NUM_THREADS "
            "or a plug-in starts threads at import",
        )
    return ok(CHECK, words)


def import_engine(environ: dict[str, str], timeout_s: float = IMPORT_TIMEOUT_S) -> Imported:
    """Import torch and vLLM in a process of its own."""
    environ = {**environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return run_script(_SCRIPT, environ, timeout_s)


def run_script(script: str, environ: dict[str, str], timeout_s: float) -> Imported:
    """Run Python code that writes an `Imported` as JSON to its standard output."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env=environ,
        )
    except subprocess.TimeoutExpired:
        return Imported(error=f"not done after {timeout_s:.0f} s")
    if done.returncode == 0:
        return msgspec.json.decode(done.stdout, type=Imported)
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return Imported(error=lines[-1] if lines else f"it ended with {done.returncode}")
