"""Does the model fit where its workers are placed, and how much KV cache is left beside it?

What does not fit ends the start before anything is loaded, with what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master import sizing
from tinfer.master.gpu_placement import GpuLayout
from tinfer.master.gpus import Gpu
from tinfer.master.host_memory import HostMemory
from tinfer.master.model_files import Weights, loaded_bytes
from tinfer.master.sizing import ModelShape

# On a CPU a worker's KV cache holds at least this much, and at least two longest requests, but
# never more than its share of a quarter of the memory.
CPU_KV_BYTES = 256 << 20
# vLLM keeps one block to itself. Its default on a CPU; on GPUs a block is smaller.
BLOCK_TOKENS = 128


class Needs(Struct, frozen=True):
    """What one model needs: `weights_bytes` in all, KV bytes of a token in all."""

    shape: ModelShape
    weights: Weights
    max_model_len: int
    step_tokens: int
    max_num_seqs: int
    block_tokens: int
    kv_cache_dtype: str = "auto"
    quantization: str | None = None

    @classmethod
    def of(cls, config: ServeConfig, shape: ModelShape, weights: Weights) -> Needs:
        return cls(
            shape=shape,
            weights=weights,
            max_model_len=config.max_model_len or shape.max_tokens,
            step_tokens=config.step_tokens,
            max_num_seqs=config.max_num_seqs,
            block_tokens=config.block_size or BLOCK_TOKENS,
            kv_cache_dtype=config.kv_cache_dtype,
            quantization=config.quantization,
        )

    def weights_bytes(self, dtype: str) -> int:
        """Bytes of the weights once loaded, over all ranks."""
        item_bytes = sizing.ITEM_BYTES.get(dtype, 2)
        in_files = sizing.ITEM_BYTES.get(self.shape.dtype, 2)
        if self.shape.is_quantized:  # of tensors that nobody can tell apart before the download
            in_files = item_bytes
        num_bytes = loaded_bytes(self.weights, item_bytes, in_files)
        if self.shape.is_quantized or self.quantization not in sizing.ONE_BYTE_WEIGHTS:
            return num_bytes
        # Quantized while it is loaded, but for what turns tokens into vectors and back.
        ends = 2 * self.shape.vocab_size * self.shape.hidden_size * item_bytes
        return min(num_bytes, ends) + max(0, num_bytes - ends) // item_bytes

    def kv_dtype(self, dtype: str) -> str:
        """The type of the KV blocks of an engine that computes in `dtype`."""
        return dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def fixed_bytes(self, dtype: str, tp_size: int) -> int:
        """What a GPU rank needs besides its KV."""
        reserve = sizing.gpu_reserve_bytes(
            self.shape, dtype, tp_size, self.step_tokens, self.max_num_seqs
        )
        return self.weights_bytes(dtype) // tp_size + reserve

    def longest_kv_bytes(self, dtype: str, tp_size: int) -> int:
        """KV of one longest request on one rank, in whole blocks and beside the engine's own."""
        kv_dtype = self.kv_dtype(dtype)
        rank = sizing.kv_bytes_per_token_and_rank(self.shape, kv_dtype, tp_size)
        num_blocks = -(-self.max_model_len // self.block_tokens) + 1
        return num_blocks * self.block_tokens * rank


def kv_bytes_on_gpus(
    config: ServeConfig, needs: Needs, layout: GpuLayout, gpus: Sequence[Gpu], dtypes: list[str]
) -> list[int]:
    """KV bytes that each worker can have on each of its ranks, in the order of the placements.

    Raises `StartError` for the first worker whose model does not fit, naming what would.
    """
    room = []
    for placement, group, dtype in zip(layout.placements, layout.groups, dtypes, strict=True):
        share = placement.memory_share or config.gpu_memory_utilization
        limit = int(min(gpu.total_bytes for gpu in group) * share)
        size = placement.tensor_parallel_size
        fixed, longest = needs.fixed_bytes(dtype, size), needs.longest_kv_bytes(dtype, size)
        kv_bytes = config.kv_cache_memory_bytes or limit - fixed
        if fixed + max(longest, config.kv_cache_memory_bytes or 0) > limit or kv_bytes < longest:
            what = f"{placement.worker_id} has {gib(limit)} ({share:.0%} of {placement.label})"
            raise StartError(_too_large(config, needs, dtype, what, limit, gpus))
        room.append(kv_bytes)
    return room


def _too_large(
    config: ServeConfig, needs: Needs, dtype: str, what: str, limit: int, gpus: Sequence[Gpu]
) -> str:
    size = config.tensor_parallel_size
    fixed, longest = needs.fixed_bytes(dtype, size), needs.longest_kv_bytes(dtype, size)
    text = (
        f"the model does not fit: {what} and needs {gib(fixed + longest)} "
        f"({gib(needs.weights_bytes(dtype) // size)} weights, {gib(longest)} KV for one request of "
        f"{needs.max_model_len} tokens, the rest to compute)"
    )
    if config.kv_cache_memory_bytes and config.kv_cache_memory_bytes < longest:
        return f"{text}; --kv-cache-memory-bytes allows {gib(config.kv_cache_memory_bytes)}"
    ways = []
    whole = int(min(gpu.total_bytes for gpu in gpus) * config.gpu_memory_utilization)
    if (fitting := fitting_tp_size(needs, dtype, whole, len(gpus), size)) is not None:
        ways.append(f"--tensor-parallel-size {fitting} fits (of the {len(gpus)} GPUs here)")
    elif size == 1 and len(gpus) > 1:
        ways.append(f"no --tensor-parallel-size fits the {len(gpus)} GPUs here")
    if limit < whole and fixed + longest <= whole:
        ways.append("one worker alone on the GPU fits: leave out --prefill and --decode")
    shorter = shorter_len(needs, dtype, size, limit)
    if shorter:
        ways.append(f"--max-model-len {shorter} fits")
    return f"{text}; {'; '.join(ways) or 'take larger GPUs or a smaller (quantized) model'}"


def fitting_tp_size(
    needs: Needs, dtype: str, limit_bytes: int, num_gpus: int, above: int
) -> int | None:
    """The least number of ranks over `above` that the model splits and fits over, if there are so
    many GPUs."""
    for size in range(above + 1, num_gpus + 1):
        if sizing.splits(needs.shape, size):
            continue
        if needs.fixed_bytes(dtype, size) + needs.longest_kv_bytes(dtype, size) <= limit_bytes:
            return size
    return None


def shorter_len(needs: Needs, dtype: str, tp_size: int, limit_bytes: int) -> int:
    """The longest request, in whole 1024s of tokens, that fits beside the weights; 0 if none."""
    per_token = sizing.kv_bytes_per_token_and_rank(needs.shape, needs.kv_dtype(dtype), tp_size)
    left = limit_bytes - needs.fixed_bytes(dtype, tp_size)
    tokens = left // per_token - needs.block_tokens if per_token and left > 0 else 0
    tokens = max(0, tokens)
    return tokens - tokens % 1024 if tokens < needs.max_model_len else 0


def kv_bytes_on_cpu(
    config: ServeConfig, needs: Needs, dtype: str, num_workers: int, memory: HostMemory
) -> int:
    """KV bytes of each rank of a CPU worker. Raises `StartError` if all workers together want more
    memory than there is."""
    size = config.tensor_parallel_size
    longest = needs.longest_kv_bytes(dtype, size)
    share = memory.total_bytes // 4 // (num_workers * size)
    kv_bytes = config.kv_cache_memory_bytes
    if kv_bytes is None:
        kv_bytes = min(max(CPU_KV_BYTES // size, 2 * longest), share)
    if kv_bytes < longest:
        per_token = sizing.kv_bytes_per_token_and_rank(needs.shape, needs.kv_dtype(dtype), size)
        fits = max(0, kv_bytes // per_token // needs.block_tokens - 1) * needs.block_tokens
        shorter = f"--max-model-len {fits - fits % 1024 or fits} fits, or " if fits else ""
        raise StartError(
            f"{gib(kv_bytes)} of KV cache per worker do not hold a request of "
            f"{needs.max_model_len} tokens ({gib(longest)}): {shorter}"
            "set --kv-cache-memory-bytes"
        )
    weights = needs.weights_bytes(dtype)
    reserve = sizing.CPU_RESERVE_BYTES * size
    wanted = num_workers * (weights + reserve + kv_bytes * size)
    if wanted > memory.free_bytes:
        raise StartError(
            f"the model does not fit: {num_workers} workers need {gib(wanted)} "
            f"({gib(weights)} weights and {gib(kv_bytes * size)} KV cache each), "
            f"{gib(memory.free_bytes)} of {memory.limited_by} are free; fewer workers, "
            "--max-model-len or --kv-cache-memory-bytes lower it"
        )
    return kv_bytes


def gib(num_bytes: float) -> str:
    """Bytes as memory is counted."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{1 if unit == 'GiB' else 0}f} {unit}"
    return f"{num_bytes:.0f} bytes"
