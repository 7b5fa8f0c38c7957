"""How KV blocks will move between the workers, decided once before any of them starts.

On GPUs that takes a real probe, which needs torch and CUDA; it runs in processes of its own, so
that neither the master nor the import process ever holds a CUDA context.
"""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec
from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master.placement import Placement

# The probe's own bound is 120 s for its two processes; this one covers its start as well.
CHOICE_TIMEOUT_S = 180.0


class Choice(Struct, frozen=True):
    """The transport of all workers, and why; `error` instead where the one asked for cannot be."""

    name: str = ""
    reason: str = ""
    error: str = ""


def expect(config: ServeConfig, placements: list[Placement]) -> str:
    """What the plan says of it before any probe. Raises `StartError` for what can never be."""
    if placements[0].device == "cpu":
        return _on_cpu_or_error(config.kv_transport).reason
    if config.kv_transport == "shm":
        raise StartError("--kv-transport shm: it moves CPU memory, and the workers are on GPUs")
    if len(placements) == 1:
        return "none: there is one worker"
    if config.kv_transport == "auto":
        return "cuda-ipc if a probe shows that it works, else through pinned host memory"
    return f"{config.kv_transport}, as asked for"


async def choose(config: ServeConfig, placements: list[Placement]) -> Choice:
    """What `--kv-transport` comes down to here. Raises `StartError` if it cannot be had."""
    if placements[0].device == "cpu":
        return _on_cpu_or_error(config.kv_transport)
    choice = await _probed(config.kv_transport, placements)
    if choice.error:
        raise StartError(f"--kv-transport {config.kv_transport}: {choice.error}")
    return choice


def _on_cpu_or_error(requested: str) -> Choice:
    if requested in ("auto", "shm"):
        return Choice("shm", "workers on CPU share memory")
    raise StartError(f"--kv-transport {requested}: it moves GPU memory, and the workers are on CPU")


async def _probed(requested: str, placements: list[Placement]) -> Choice:
    # A GPU that workers share, or a rank's of several, counts once: CUDA takes no name twice.
    devices = list(dict.fromkeys(uuid for p in placements for uuid in p.own_devices))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tinfer.worker.kv.probe",
        "choose",
        requested,
        str(len(devices)),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), CHOICE_TIMEOUT_S)
    except BaseException as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise StartError("the probe of the GPUs' memory did not end in time") from error
        raise
    if process.returncode != 0:
        last = err.decode(errors="replace").strip().splitlines()[-1:]
        raise StartError(f"the probe of the GPUs' memory failed: {''.join(last)}")
    return msgspec.json.decode(out, type=Choice)
