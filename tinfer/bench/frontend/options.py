"""What `tinfer bench frontend` was asked for, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

from tinfer.bench.compare.options import VLLM_COMMAND

Kind = Literal["master-whole", "master-split", "relay", "tinfer", "vllm-1", "vllm-2"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Their engines are stand-ins that keep to a pace; those of the others compute the built-in model.
PACED: tuple[Kind, ...] = ("master-whole", "master-split", "relay")
MASTERS: tuple[Kind, ...] = ("master-whole", "master-split")
VLLM: tuple[Kind, ...] = ("vllm-1", "vllm-2")


class FrontendOptions(Struct, frozen=True, kw_only=True):
    """Options of one run, by their flags' names.

    `rate` is in tokens/s over all streams. A point lasts about `seconds` at that rate, and has as
    many tokens at full speed, times `full_factor`.
    """

    arms: tuple[Kind, ...] = KINDS
    streams: tuple[int, ...] = (1, 64, 256, 1024)
    rate: float = 10_000.0
    seconds: float = 5.0
    full_factor: float = 4.0
    repetitions: int = 3
    num_requests: int = 1000
    seed: int = 0
    vllm_command: tuple[str, ...] = VLLM_COMMAND
    start_timeout_s: float = 300.0
    json_path: str | None = None
    plot_dir: Path | None = None
    log_dir: Path | None = None


def parse_arms(text: str) -> tuple[Kind, ...]:
    """Comma-separated kinds, each once. Raises `ValueError` for an unknown one."""
    words = dict.fromkeys(word.strip() for word in text.split(",") if word.strip())
    for word in words:
        if word not in KINDS:
            raise ValueError(f"{word!r} is none of {', '.join(KINDS)}")
    if not words:
        raise ValueError("no arm")
    return tuple(kind for kind in KINDS if kind in words)


def parse_streams(text: str) -> tuple[int, ...]:
    """Comma-separated numbers from 1 to 4096. Raises `ValueError`."""
    numbers = tuple(dict.fromkeys(int(word) for word in text.split(",") if word.strip()))
    if not numbers or not all(1 <= number <= 4096 for number in numbers):
        raise ValueError(f"{text!r}: streams are numbers from 1 to 4096, as 1,64,256,1024")
    return numbers
