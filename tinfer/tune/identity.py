"""What a tuning holds for: this device, this model, computed this way."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

from msgspec import Struct

from tinfer.errors import StartError
from tinfer.tune.points import Positive

CONFIG_NAME = "config.json"
FAKE_DEVICE = "fake engine"
_HASH_CHARS = 16
_WORD_CHARS = 40


class Identity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two workers with equal ones are taken to be equally fast.

    `device` is the processor's or the GPU's name as its maker gives it; `num_threads` those of each
    rank on a CPU, 1 on a GPU; `model_hash` is of config.json and `weights_bytes` the size of the
    weights' files; `is_eager` tells that no CUDA graphs are used.
    """

    device: str
    num_threads: int
    model_hash: str
    weights_bytes: int
    dtype: str
    tensor_parallel_size: Positive
    is_eager: bool

    @property
    def file_name(self) -> str:
        """Readable, and different for different identities."""
        values = "\0".join(str(getattr(self, name)) for name in self.__struct_fields__)
        words = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")[:_WORD_CHARS]
        digest = hashlib.sha256(values.encode()).hexdigest()[:_HASH_CHARS]
        return f"{words}-{self.dtype}-{digest}.json"


def identity_of(
    *,
    gpu_model: str | None,
    num_threads: int,
    directory: Path,
    weights_bytes: int,
    dtype: str,
    tensor_parallel_size: int,
    enforce_eager: bool,
    is_fake: bool = False,
) -> Identity:
    """Of a worker: without `gpu_model` it is on this box's CPU; `directory` has the model's
    config.json. Raises `StartError` if that cannot be read."""
    return Identity(
        device=FAKE_DEVICE if is_fake else gpu_model or cpu_name(),
        num_threads=num_threads,
        model_hash=hash_of_model(directory),
        weights_bytes=weights_bytes,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        is_eager=enforce_eager or gpu_model is None,
    )


def hash_of_model(directory: Path) -> str:
    """Of config.json, byte by byte. Raises `StartError` if it cannot be read."""
    path = directory / CONFIG_NAME
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:_HASH_CHARS]
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the kernel does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.machine() or "unknown processor"
