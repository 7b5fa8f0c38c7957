"""The format that a worker reports says the same as the check before the first copy."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tinfer.worker.kv.errors import GeometryMismatch
from tinfer.worker.kv.format import kv_format
from tinfer.worker.kv.geometry import Geometry, Region, check_compatible

REGION = Region(0, 2, 4096, 512, 512, 0)
GEOMETRY = Geometry("LBHNC", "bfloat16", 16, 8, 1 << 16, "m", 1, 0, (REGION,))


def fits(theirs: Geometry) -> bool:
    try:
        check_compatible(GEOMETRY, theirs)
    except GeometryMismatch:
        return False
    return True


@pytest.mark.parametrize(
    ("change", "is_like"),
    [
        ({}, True),
        ({"num_blocks": 4}, True),
        ({"total_bytes": 1 << 17}, True),
        ({"layout": "LBNHC"}, False),
        ({"dtype": "float16"}, False),
        ({"block_tokens": 32}, False),
        ({"model_hash": "n"}, False),
        ({"tp_size": 2}, False),
        ({"regions": (REGION, REGION)}, False),
    ],
)
def test_what_makes_a_difference(change: dict[str, Any], is_like: bool) -> None:
    theirs = msgspec.structs.replace(GEOMETRY, **change)
    assert (kv_format([theirs]) == kv_format([GEOMETRY])) is is_like
    assert fits(theirs) is is_like


@pytest.mark.parametrize(
    ("change", "is_like"),
    [
        ({"offset_bytes": 64}, True),
        ({"layer_stride_bytes": 8192}, True),
        ({"block_stride_bytes": 1024}, True),
        ({"num_layers": 1}, False),
        ({"page_bytes": 256}, False),
        ({"group": 1}, False),
    ],
)
def test_what_makes_a_difference_in_a_region(change: dict[str, Any], is_like: bool) -> None:
    region = msgspec.structs.replace(REGION, **change)
    theirs = msgspec.structs.replace(GEOMETRY, regions=(region,))
    assert (kv_format([theirs]) == kv_format([GEOMETRY])) is is_like
    assert fits(theirs) is is_like


def test_the_ranks_of_a_worker_count_together() -> None:
    other = msgspec.structs.replace(GEOMETRY, tp_size=2)
    both = kv_format([other, msgspec.structs.replace(other, tp_rank=1)])
    assert both["tensor_parallel_size"] == "2"
    assert both["pages"] == "2x512/0 2x512/0"
