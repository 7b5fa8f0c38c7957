"""The tinfer connector: how vLLM's scheduler and model runner meet our hand-off.

vLLM builds this class twice, once per role. The scheduler side (`handoff_scheduler`) decides: which
finished prefill is held under which lease, which blocks a decode request pulls, which leases have
ended. The worker side (`handoff_worker`) acts: it allocates exportable KV memory, maps peers and
copies. What the first tells the second travels in the step's metadata, what the second reports in
the step's output, so the two also work where they live in different processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from tinfer.worker.handoff_messages import ExportMetadata, HandoffMetadata, PullReport
from tinfer.worker.handoff_scheduler import SchedulerSide
from tinfer.worker.handoff_worker import WorkerSide

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class TinferConnector(KVConnectorBase_V1, SupportsHMA):
    """Routes vLLM's hooks to the side that this instance plays."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config)
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config)

    @property
    def scheduler_side(self) -> SchedulerSide:
        assert self._scheduler is not None, "asked of the worker's instance"
        return self._scheduler

    @property
    def worker_side(self) -> WorkerSide:
        assert self._worker is not None, "asked of the scheduler's instance"
        return self._worker

    # --- scheduler role -----------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler_side.num_pullable_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return self._kv_cache_config.transfer_group_ids

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self.scheduler_side.blocks_allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler_side.build_metadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler_side.step_done(connector_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler_side.request_finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        return self.scheduler_side.has_queued_work()

    def has_pending_block_frees(self) -> bool:
        """Whether vLLM should wait for blocks rather than preempt. An open lease is no reason: its
        reader may be waiting for blocks in turn, for those of a request that waits for ours."""
        return self.scheduler_side.has_ending_leases()

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        exports = {rank: m for rank, m in metadata.items() if isinstance(m, ExportMetadata)}
        self.scheduler_side.set_exports(exports)

    # --- worker role --------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        return self.worker_side.allocation_context()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker_side.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self.worker_side.export_metadata()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            assert isinstance(metadata, HandoffMetadata)
            self.worker_side.begin_step(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: pulls end between steps, before their request is scheduled."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing: readers take the blocks from the KV cache itself."""

    def wait_for_save(self) -> None:
        """Nothing: see `save_kv_layer`."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self.worker_side.transfer_results()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report: PullReport | None = self.worker_side.take_report()
        return report

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
