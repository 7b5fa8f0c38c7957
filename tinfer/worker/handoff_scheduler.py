"""The scheduler side of the hand-off: which blocks are held for whom, and which are pulled.

Runs in vLLM's scheduler. It owns the lease table and with it the invariant that a finished
prefill's blocks are freed only after their reader has stopped: a lease ends in the table, the end
travels through one step, and the row is invalidated before the blocks return to the pool.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from vllm.v1.request import RequestStatus

from tinfer.wire.messages import (
    LeaseId,
    LeasesEnded,
    LeasesOverdue,
    PullDone,
    Source,
    WorkerStats,
    decode_opaque,
    shown,
)
from tinfer.worker.adapter import Notice
from tinfer.worker.handoff_messages import ExportMetadata, HandoffMetadata, Peer, PullReport
from tinfer.worker.kv.errors import LeaseTableFull, StagingFull
from tinfer.worker.kv.lease import DEFAULT_SLOTS, LeaseRef, LeaseTable
from tinfer.worker.kv.puller import Pull, PullResult
from tinfer.worker.kv.rank_results import RankResults
from tinfer.worker.kv.source import DEFAULT_STAGING_SLOTS, SourceBlocks, block_source

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """What the ready message says of the hand-off."""

    kv_bytes: int
    transport: str
    device: str


@dataclass
class _Held:
    """A finished prefill whose blocks wait for a reader."""

    request_id: str
    source: SourceBlocks


@dataclass
class _Pulling:
    """A decode request between the allocation of its blocks and the end of its pull."""

    external_id: str
    started_s: float
    results: RankResults


class SchedulerSide:
    """Owned by the scheduler's instance of the connector; called from the engine's thread."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        extra = transfer.kv_connector_extra_config
        self._worker_id: str = extra["worker_id"]
        self._worker_generation: int = extra["generation"]
        self._lease_ttl_s: float = extra["lease_ttl_s"]
        self._num_ranks = vllm_config.parallel_config.tensor_parallel_size
        self._kv_cache_config = kv_cache_config
        self._block_tokens = vllm_config.cache_config.block_size
        # Every lease holds at least one block, so this many slots never run out.
        self._leases = LeaseTable.create(max(DEFAULT_SLOTS, kv_cache_config.num_blocks))
        self._source = block_source(extra["transport"], DEFAULT_STAGING_SLOTS)
        self._held: dict[LeaseRef, _Held] = {}
        self._pulling: dict[str, _Pulling] = {}
        self._next = HandoffMetadata()
        self._notices: list[Notice] = []
        self._ended: list[LeaseId] = []
        self._ending: list[LeaseRef] = []
        self._closing: list[LeaseRef] = []
        self._summary = Summary(0, "", "")
        self._exports: dict[int, bytes] = {}
        self._mapped: dict[int, tuple[int, int]] = {}
        self._counts = dict.fromkeys(("num_pulls", "num_failed_pulls", "pulled_bytes"), 0)
        self._pull_s = 0.0

    # --- what the engine adapter asks -----------------------------------------------------------

    def set_exports(self, exports: dict[int, ExportMetadata]) -> None:
        """What each rank exports, learned from vLLM's handshake once the KV cache exists."""
        self._exports = {rank: metadata.export for rank, metadata in exports.items()}
        first = exports[0]
        self._summary = Summary(
            sum(m.kv_bytes for m in exports.values()), first.transport, first.device
        )

    def export(self) -> tuple[bytes, Summary]:
        """What peers need to pull from this worker, and what a person wants to know of it."""
        published = PublishedExport(
            ranks=[self._exports[rank] for rank in sorted(self._exports)],
            leases=msgspec.msgpack.encode(self._leases.descriptor()),
        )
        return msgspec.msgpack.encode(published), self._summary

    def add_peer(self, worker_id: str, generation: int, export: bytes) -> None:
        """Have the ranks map a peer; one whose export cannot be read stays unknown to them, and
        pulls from it fail."""
        try:
            published = decode_opaque(PublishedExport, export)
        except msgspec.DecodeError as error:
            log.warning("export of %.64a dropped: %s", worker_id, shown(error))
            return
        self._next.peers_up.append(Peer(worker_id, generation, published.ranks, published.leases))

    def drop_peer(self, worker_id: str, generation: int) -> None:
        self._next.peers_down.append((worker_id, generation))

    def transfer_params(self, source: Source) -> dict[str, Any]:
        """What a decode request carries to this connector through vLLM.

        The key names are vLLM's: its scheduler counts fetches by them. A source whose blocks cannot
        be read offers nothing.
        """
        try:
            decode_opaque(SourceBlocks, source.blocks)
        except msgspec.DecodeError as error:
            log.warning("blocks of %.64a dropped: %s", source.worker_id, shown(error))
            source = msgspec.structs.replace(source, num_tokens=0, num_blocks=0)
        return {"do_remote_prefill": True, "source": source}

    def source_of(self, params: dict[str, Any] | None) -> Source | None:
        """The source that `request_finished` has put into a prefill's final output."""
        return None if params is None else params.get("held")

    def mark_unused(self, source: Source) -> None:
        """This worker will not read that source."""
        ref = LeaseRef(source.lease.slot, source.lease.generation)
        self._next.unused.append((source.worker_id, source.worker_generation, ref))

    def release_lease(self, lease: LeaseId) -> None:
        ref = LeaseRef(lease.slot, lease.generation)
        if ref in self._held:
            self._leases.release(ref)

    def extend_lease(self, lease: LeaseId, extra_s: float) -> None:
        ref = LeaseRef(lease.slot, lease.generation)
        if ref in self._held:
            self._leases.extend(ref, time.monotonic() + extra_s)

    def has_ending_leases(self) -> bool:
        """Whether this very step gives blocks back, so that none need be taken from a request."""
        self._poll_leases()
        return bool(self._ending)

    def has_queued_work(self) -> bool:
        """Whether the next step has orders for the worker side, so that it must run."""
        return bool(self._next)

    def has_notices(self) -> bool:
        return bool(self._notices or self._ended)

    def take_notices(self, stats: Callable[[], WorkerStats]) -> list[Notice]:
        notices, self._notices = self._notices, []
        if self._ended:
            notices.append(LeasesEnded(self._ended, stats()))
            self._ended = []
        return notices

    def counters(self) -> dict[str, Any]:
        """Those fields of `WorkerStats` that the hand-off knows."""
        return {
            **self._counts,
            "pull_s": self._pull_s,
            "num_open_leases": len(self._held),
            "num_mapped_peers": max((mapped for mapped, _ in self._mapped.values()), default=0),
            "num_stale_mappings": max((stale for _, stale in self._mapped.values()), default=0),
        }

    # --- hooks of vLLM's scheduler ----------------------------------------------------------------

    def num_pullable_tokens(self, request: Request, num_computed: int) -> tuple[int, bool]:
        """All that is not here yet: of the prompt, and of what a preempted request has answered.
        vLLM itself backs off the last token."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return 0, False
        source: Source = params["source"]
        missing = min(source.num_tokens, request.num_tokens) - num_computed
        return (missing, True) if missing > 0 else (0, False)

    def blocks_allocated(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Called a second time after the pull, when there is nothing left to decide."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return
        params["do_remote_prefill"] = False
        source: Source = params["source"]
        if num_external_tokens == 0:
            # All of it is here already, or the source could not be staged or read: offers nothing.
            self.mark_unused(source)
            offered_any = source.num_tokens > 0
            reason = "" if offered_any else "the source offers nothing; the prompt is computed here"
            whose = external_id(request.request_id)
            self._notices.append(PullDone(whose, offered_any, reason, 0, 0.0, 0.0))
            return
        offered = msgspec.msgpack.decode(source.blocks, type=SourceBlocks)
        targets = self._kv_cache_config.select_transfer_block_ids(
            blocks.get_unhashed_block_ids_all_groups()
        )
        # One that was preempted before its first token lacks what the source has of its answer.
        num_blocks = self._num_blocks(min(source.num_tokens, request.num_tokens))
        pairs = [
            _tail(there[:num_blocks], here)
            for there, here in zip(offered.blocks, targets, strict=True)
        ]
        self._next.pulls.append(
            Pull(
                request_id=request.request_id,
                worker_id=source.worker_id,
                generation=source.worker_generation,
                lease=LeaseRef(source.lease.slot, source.lease.generation),
                source=SourceBlocks(tuple(there for there, _ in pairs)),
                dst_blocks=tuple(here for _, here in pairs),
            )
        )
        self._pulling[request.request_id] = _Pulling(
            external_id(request.request_id), time.monotonic(), RankResults(self._num_ranks)
        )

    def build_metadata(self) -> HandoffMetadata:
        """This step's orders; ended leases go through the step, so that their blocks are freed
        only after the row has been invalidated in `step_done`."""
        self._poll_leases()
        metadata, self._next = self._next, HandoffMetadata()
        metadata.ended = [self._held[ref].request_id for ref in self._ending]
        self._closing, self._ending = self._ending, []
        return metadata

    def step_done(self, output: KVConnectorOutput) -> None:
        """Runs before vLLM frees the blocks of `output.finished_sending`."""
        for ref in self._closing:
            held = self._held.pop(ref)
            self._leases.close_lease(ref)
            self._source.finish(held.source)
            self._ended.append(_lease_id(ref))
        self._closing = []
        report = output.kv_connector_worker_meta
        if isinstance(report, PullReport):
            self._mapped |= report.mapped
            for ref, rank in report.staged:
                self._leases.mark_ready(ref, rank)
            for result in report.results:
                self._pull_ended(result)

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Hold a finished prefill's blocks; let go of a source that was never read."""
        params = request.kv_transfer_params
        if not params:
            return False, None
        if params.get("do_remote_prefill"):
            self.mark_unused(params["source"])
            return False, None
        if request.request_id in self._pulling:
            self._next.cancels.append(request.request_id)
        wanted = params.get("do_remote_decode")
        if not wanted or request.status is not RequestStatus.FINISHED_LENGTH_CAPPED:
            return False, None
        source = self._hold(request, block_ids)
        return (False, None) if source is None else (True, {"held": source})

    # --- inside -----------------------------------------------------------------------------------

    def _poll_leases(self) -> None:
        if not self._held:
            return
        ended, overdue = self._leases.poll()
        self._ending += ended
        if overdue:
            self._notices.append(LeasesOverdue([_lease_id(ref) for ref in overdue]))

    def _hold(self, request: Request, block_ids: tuple[list[int], ...]) -> Source | None:
        num_tokens = request.num_prompt_tokens
        num_blocks = self._num_blocks(num_tokens)
        groups = self._kv_cache_config.select_transfer_block_ids(block_ids)
        blocks = [group[:num_blocks] for group in groups]
        try:
            offered = self._source.prepare(blocks)
        except StagingFull:
            # The reader learns that there is nothing to pull and computes the prompt itself.
            num_tokens, offered, blocks = 0, SourceBlocks(()), []
        try:
            ref = self._leases.open_lease(
                time.monotonic() + self._lease_ttl_s,
                self._num_ranks,
                ready=not self._source.needs_staging,
            )
        except LeaseTableFull:
            self._source.finish(offered)
            return None
        order = self._source.order(ref, blocks, offered)
        if order is not None and num_tokens:
            self._next.stages.append(order)
        self._held[ref] = _Held(request.request_id, offered)
        return Source(
            worker_id=self._worker_id,
            worker_generation=self._worker_generation,
            lease=_lease_id(ref),
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            blocks=msgspec.msgpack.encode(offered),
        )

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _pull_ended(self, part: PullResult) -> None:
        """One rank's part of a pull has ended."""
        pulling = self._pulling.get(part.request_id)
        result = None if pulling is None else pulling.results.add(part)
        if pulling is None or result is None:
            return
        del self._pulling[part.request_id]
        copy_s = (result.finished_ns - result.started_ns) / 1e9
        self._counts["num_pulls"] += 1
        self._counts["num_failed_pulls"] += not result.ok
        self._counts["pulled_bytes"] += result.num_bytes
        self._pull_s += copy_s
        handoff_s = time.monotonic() - pulling.started_s
        self._notices.append(
            PullDone(
                pulling.external_id, result.ok, result.reason, result.num_bytes, copy_s, handoff_s
            )
        )

    def close(self) -> None:
        self._leases.close()


class PublishedExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `Ready.export`: one encoded export per rank, and the lease table."""

    ranks: Annotated[list[bytes], msgspec.Meta(min_length=1)]
    leases: bytes


def _tail(there: tuple[int, ...], here: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The end of the offered blocks, which are those of all tokens, that is still missing here."""
    return (there[len(there) - len(here) :] if here else ()), tuple(here)


def _lease_id(ref: LeaseRef) -> LeaseId:
    return LeaseId(ref.slot, ref.generation)


def external_id(request_id: str) -> str:
    """vLLM appends a random suffix to the id that it was given."""
    return request_id.rpartition("-")[0]
