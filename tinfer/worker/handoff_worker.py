"""The worker side of the hand-off: exportable KV memory, mapped peers, copies beside the steps.

Runs where the KV cache is. Copies run on the puller's thread while the engine steps; a step only
submits them and collects what has ended.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from tinfer.wire.messages import decode_opaque, shown
from tinfer.worker.handoff_messages import ExportMetadata, HandoffMetadata, Peer, PullReport
from tinfer.worker.kv.format import block_dtype
from tinfer.worker.kv.geometry import Geometry, Region
from tinfer.worker.kv.probe import build_transport
from tinfer.worker.kv.puller import PeerInfo, Puller, PullResult
from tinfer.worker.kv.shm import ShmDescriptor
from tinfer.worker.kv.transport import Export, Transport
from tinfer.worker.wake import Waker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


log = logging.getLogger(__name__)


class UnsupportedKVCache(ValueError):
    """The model keeps a KV cache that the hand-off does not move; the message says which."""


class RankExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's KV memory and where the blocks lie in it."""

    export: Export
    geometry: Geometry


class WorkerSide:
    """Owned by the worker's instance of the connector; called from the engine's thread."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        _refuse_unsupported(kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        extra = transfer.kv_connector_extra_config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._rank = get_tensor_model_parallel_rank()
        self._wake = Waker(extra["wake_path"])
        self._transport = _transport(extra["transport"])
        self._puller: Puller | None = None
        self._export: ExportMetadata | None = None
        self._results: list[PullResult] = []
        self._ended: list[str] = []
        self._reported = (-1, -1)

    def allocation_context(self) -> AbstractContextManager[Any] | None:
        return self._transport.allocation_context()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Publish the one backing buffer that all layers' tensors are views of."""
        storage = next(iter(kv_caches.values())).untyped_storage()
        if any(t.untyped_storage().data_ptr() != storage.data_ptr() for t in kv_caches.values()):
            raise UnsupportedKVCache("the KV cache is not one allocation")
        device = storage.device
        view: Any = torch.empty(0, dtype=torch.int8, device=device)
        buffer: torch.Tensor = view.set_(storage, 0, (storage.nbytes(),), (1,))
        geometry = self._geometry(storage.nbytes())
        export = self._transport.export(buffer, geometry)
        self._export = ExportMetadata(
            export=msgspec.msgpack.encode(RankExport(export, geometry)),
            kv_bytes=geometry.total_bytes,
            transport=self._transport.name,
            device=str(device),
        )
        self._puller = Puller(self._transport, buffer, geometry, self._wake, rank=self._rank)

    def _geometry(self, total_bytes: int) -> Geometry:
        config = self._kv_cache_config
        cache = self._vllm_config.cache_config
        return Geometry(
            layout=config.kv_cache_layout or "",
            dtype=block_dtype(
                str(config.kv_cache_groups[0].kv_cache_spec.dtype),  # type: ignore[attr-defined]
                cache.cache_dtype,
            ),
            block_tokens=cache.block_size,
            num_blocks=config.num_blocks,
            total_bytes=total_bytes,
            model_hash=self._vllm_config.model_config.compute_hash(),
            tp_size=self._vllm_config.parallel_config.tensor_parallel_size,
            tp_rank=self._rank,
            regions=tuple(
                Region(
                    offset_bytes=tensor.offset,
                    num_layers=len(tensor.layers),
                    layer_stride_bytes=tensor.layer_stride,
                    block_stride_bytes=tensor.block_stride,
                    page_bytes=_page_bytes(config, tensor.layers[0]),
                    group=0,
                )
                for tensor in config.kv_cache_tensors
            ),
        )

    def export_metadata(self) -> ExportMetadata | None:
        return self._export

    # --- each step --------------------------------------------------------------------------------

    def begin_step(self, orders: HandoffMetadata) -> None:
        """Carry out the scheduler side's orders; copies start, none is waited for."""
        puller = self._open_puller()
        for peer in orders.peers_up:
            if (info := self._peer_info(peer)) is not None:
                puller.add_peer(info)
        for worker_id, generation in orders.peers_down:
            puller.drop_peer(worker_id, generation)
        for worker_id, generation, lease in orders.unused:
            puller.notify_unused(worker_id, generation, lease)
        for request_id in orders.cancels:
            puller.cancel(request_id)
        for order in orders.stages:
            self._transport.stage(order)
        for pull in orders.pulls:
            puller.submit(pull)
        self._ended = orders.ended

    def _peer_info(self, peer: Peer) -> PeerInfo | None:
        """None for a peer that published what cannot be read: pulls from it fail."""
        # A peer with fewer ranks has none of this number; any of them tells that the two differ,
        # and the puller refuses it for that.
        number = min(self._rank, len(peer.ranks) - 1)
        try:
            rank = decode_opaque(RankExport, peer.ranks[number])
            lease_table = decode_opaque(ShmDescriptor, peer.leases)
        except msgspec.DecodeError as error:
            log.warning("export of %.64a dropped: %s", peer.worker_id, shown(error))
            return None
        return PeerInfo(
            worker_id=peer.worker_id,
            generation=peer.generation,
            export=rank.export,
            geometry=rank.geometry,
            lease_table=lease_table,
        )

    def transfer_results(self) -> KVConnectorTransferResults:
        """Pulls that ended since the last step, failed ones included, and leases that are over."""
        results = self._open_puller().poll()
        self._results += results
        ended, self._ended = self._ended, []
        return KVConnectorTransferResults(
            finished_sending=set(ended),
            finished_recving={result.request_id for result in results},
            failed_recving={result.request_id for result in results if not result.ok},
        )

    def take_report(self) -> PullReport | None:
        """What the scheduler side should know of this step; None when nothing has changed."""
        puller = self._open_puller()
        mapped = (puller.num_mapped, puller.num_stale)
        staged = [(lease, self._rank) for lease in self._transport.staged()]
        if not self._results and not staged and mapped == self._reported:
            return None
        self._reported = mapped
        results, self._results = self._results, []
        return PullReport(results, staged, {self._rank: mapped})

    def _open_puller(self) -> Puller:
        assert self._puller is not None, "asked before the KV cache was registered"
        return self._puller

    def close(self) -> None:
        """Stop the copies, unmap the peers, give up the export."""
        if self._puller is not None:
            self._puller.close()
        self._transport.close()
        self._wake.close()


def _transport(name: str) -> Transport:
    """The transport by name, for the device that vLLM has made current."""
    if name == "shm":
        return build_transport(name)
    from vllm import _custom_ops

    return build_transport(name, batch_copy=_custom_ops.swap_blocks_batch)


def _refuse_unsupported(config: KVCacheConfig) -> None:
    """Only full attention with one block table moves today; anything else is refused by name."""
    if len(config.kv_cache_groups) != 1:
        kinds = sorted({type(g.kv_cache_spec).__name__ for g in config.kv_cache_groups})
        raise UnsupportedKVCache(
            f"the model has {len(config.kv_cache_groups)} KV cache groups ({', '.join(kinds)}); "
            "only models with one group of full attention can be split"
        )
    spec = config.kv_cache_groups[0].kv_cache_spec
    specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    for one in specs:
        if not isinstance(one, FullAttentionSpec):
            raise UnsupportedKVCache(
                f"the model's KV cache is {type(one).__name__}; only full attention can be split"
            )


def _page_bytes(config: KVCacheConfig, layer: str) -> int:
    spec = config.kv_cache_groups[0].kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.kv_cache_specs[layer]
    return int(spec.page_size_bytes)
