"""What `tinfer bench handoff` was asked for, checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, get_args

from msgspec import Struct

# layers-first: each layer's blocks lie together, as vLLM has them by default. blocks-first: all
# layers of a block lie together.
Layout = Literal["layers-first", "blocks-first"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# Of cuda-ipc, each strategy is measured alone; see tinfer/worker/kv/device_copy.py.
Kind = Literal["shm", "cuda-ipc:gather", "cuda-ipc:batch", "cuda-ipc:loop", "host"]
CPU_KINDS: tuple[Kind, ...] = ("shm",)
GPU_KINDS: tuple[Kind, ...] = ("cuda-ipc:gather", "cuda-ipc:batch", "cuda-ipc:loop", "host")
NUM_LAYERS = 32

NameT = TypeVar("NameT", bound=str)


class HandoffOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one run, by their flags' names; `device` None takes a GPU if there is one.

    `pages` are sizes of one layer's share of a block, in KiB, and `sizes` those of a hand-off, in
    KiB; `buffer_bytes` is the size of each of the two KV buffers, None for 1 GiB on a CPU and 4 GiB
    on a GPU.
    """

    device: str | None = None
    layouts: tuple[Layout, ...] = LAYOUTS
    pages: tuple[int, ...] = (8, 64, 512)
    sizes: tuple[int, ...] = (2048, 16_384, 131_072)
    buffer_bytes: int | None = None
    rounds: int = 15
    seed: int = 1
    json_path: str | None = None
    plot_dir: Path | None = None


def parse_layouts(text: str) -> tuple[Layout, ...]:
    """Comma-separated names. Raises `ValueError` for an unknown one."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in LAYOUTS:
            raise ValueError(f"{word!r} is none of {', '.join(LAYOUTS)}")
    if not words:
        raise ValueError("no layout")
    return tuple(layout for layout in LAYOUTS if layout in words)


def parse_kib(largest: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of comma-separated sizes in KiB; it raises `ValueError`."""

    def parse(text: str) -> tuple[int, ...]:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",") if word.strip()))
        if not numbers or not all(1 <= number <= largest for number in numbers):
            raise ValueError(f"{text!r}: sizes are whole numbers of KiB, from 1 to {largest}")
        return numbers

    return parse
