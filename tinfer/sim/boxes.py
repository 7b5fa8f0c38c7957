"""What a box computes on: engines of tinfer's workers and of a plain replica on the same device.

A box is a preset by name (`presets` says where its numbers are from), or what `tinfer tune`
measured on a machine (`measured_box`).
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from tinfer.config import ServeConfig
from tinfer.core.costs import CostModel
from tinfer.errors import StartError
from tinfer.sim import presets
from tinfer.sim.spec import EngineSpec, WorkerSpec

# What a plain vLLM 0.32 server takes per step, but on GPUs of 70 GiB and more, where it is 8192.
REPLICA_STEP_TOKENS = 2048


class Box(Struct, frozen=True, kw_only=True):
    """Engines of one kind of device, or of one group of devices that share a model.

    `replica` is a plain engine with its own step budget. `paper_vllm` is the paper's baseline where
    it was measured on other devices than all of the box; None: one engine over all of them.
    """

    name: str
    source: str
    prefill: EngineSpec
    decode: EngineSpec
    replica: EngineSpec
    paper_vllm: EngineSpec | None = None
    chunk_tokens: int | None = None

    @property
    def num_devices(self) -> int:
        """Devices of one engine."""
        return self.replica.num_devices


def preset_box(name: str) -> Box:
    """The preset of that name. Raises `StartError` for a name that there is not."""
    if name not in presets.ENGINES:
        raise StartError(f"no preset is called {name}; there are: {', '.join(presets.ENGINES)}")
    engine = presets.ENGINES[name]
    if engine is not presets.PAPER_ENGINE:
        source = engine.costs.source
        replica = presets.replica_of(engine)
        return Box(name=name, source=source, prefill=engine, decode=engine, replica=replica)
    prefill, decode = presets.paper_workers(1, 1, with_predictor=False)
    return Box(
        name=name,
        source=engine.costs.source,
        prefill=prefill.engine,
        decode=decode.engine,
        replica=presets.PAPER_REPLICA,
        paper_vllm=presets.PAPER_VLLM,
    )


def measured_box(
    name: str,
    costs: CostModel,
    num_blocks: int,
    block_tokens: int,
    num_devices: int,
    chunk_tokens: int,
) -> Box:
    """A box as it was measured: `num_devices` per engine, of which each has `num_blocks`."""
    engine = EngineSpec(
        costs=costs,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        max_num_batched_tokens=REPLICA_STEP_TOKENS,
        num_devices=num_devices,
    )
    return Box(
        name=name,
        source=costs.source,
        prefill=engine,
        decode=engine,
        replica=engine,
        chunk_tokens=chunk_tokens,
    )


def taxed(engine: EngineSpec, tax: float) -> EngineSpec:
    """The same, each of its steps `tax` times as long: a length predictor runs beside them."""
    costs = engine.costs
    longer = {
        name: tax * getattr(costs, name)
        for name in ("base_s", "prefill_token_s", "prefill_context_s", "decode_seq_s", "kv_token_s")
    }
    return replace(engine, costs=replace(costs, **longer))


def with_noise(box: Box, noise: float) -> Box:
    """The box with step times that vary so much; see `EngineSpec.noise`."""
    return replace(
        box,
        prefill=replace(box.prefill, noise=noise),
        decode=replace(box.decode, noise=noise),
        replica=replace(box.replica, noise=noise),
        paper_vllm=None if box.paper_vllm is None else replace(box.paper_vllm, noise=noise),
    )


def workers_of(
    box: Box, num_prefill: int, num_decode: int, config: ServeConfig
) -> tuple[WorkerSpec, ...]:
    """tinfer's workers, with the step sizes that the options say, or else what was measured."""
    config = config.with_measured_chunk(box.chunk_tokens)
    prefill, decode = (_worker_engine(one, config) for one in (box.prefill, box.decode))
    return presets.workers(prefill, num_prefill, decode, num_decode)


def _worker_engine(engine: EngineSpec, config: ServeConfig) -> EngineSpec:
    """Ours gives way by progress; what else a step may hold is the options' business."""
    return replace(
        engine,
        victim="least-progress",
        prefill_order="srpt" if config.prefill_policy == "srpt" else "fcfs",
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.step_tokens,
        prefix_caching=config.enable_prefix_caching,
    )


def paper_vllm_of(box: Box, num_engines: int) -> EngineSpec:
    """The paper's baseline on the devices of `num_engines` engines.

    Where the box has no such engine of its own, it is one engine over all devices that is as many
    times as fast and as large: no real tensor parallelism scales so well, which favours it.
    """
    if box.paper_vllm is not None:
        return box.paper_vllm
    costs = box.replica.costs
    faster = {
        name: getattr(costs, name) / num_engines
        for name in ("base_s", "prefill_token_s", "prefill_context_s", "decode_seq_s", "kv_token_s")
    }
    return replace(
        box.replica,
        costs=replace(costs, **faster, source=f"{costs.source}; {num_engines} at ideal scaling"),
        num_blocks=num_engines * box.replica.num_blocks,
        num_devices=num_engines * box.num_devices,
        max_num_seqs=presets.PAPER_VLLM_NUM_SEQS,
        max_num_batched_tokens=presets.PAPER_VLLM.max_num_batched_tokens,
        chunked_prefill=False,
        prefix_caching=False,
        watermark=presets.PAPER_VLLM.watermark,
    )
