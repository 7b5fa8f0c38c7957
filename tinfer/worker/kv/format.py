"""What has to be equal for KV blocks to move between two workers, in words for the master.

The same fields decide in `geometry.check_compatible`, which looks again before the first copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinfer.worker.kv.geometry import Geometry


def block_dtype(dtype: str, cache_dtype: str) -> str:
    """The `Geometry.dtype` of blocks whose elements are of torch's type `dtype`.

    `cache_dtype` is vLLM's, "auto" where blocks are in the model's own type; it tells the 8-bit
    floats apart, which to torch are all bytes.
    """
    return dtype if cache_dtype == "auto" else f"{dtype} as {cache_dtype}"


def kv_format(ranks: Sequence[Geometry]) -> dict[str, str]:
    """The format of a worker's blocks, from the geometry of each of its ranks.

    Offsets, strides and the number of blocks are left out: they may differ between two workers.
    """
    first = ranks[0]
    pages = [
        f"{region.num_layers}x{region.page_bytes}/{region.group}"
        for rank in ranks
        for region in rank.regions
    ]
    return {
        "dtype": first.dtype,
        "layout": first.layout,
        "block_tokens": str(first.block_tokens),
        "tensor_parallel_size": str(first.tp_size),
        "pages": " ".join(pages),
        "model": first.model_hash,
    }
