"""What the two sides of the connector tell each other through vLLM's step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.puller import Pull, PullResult
from tinfer.worker.kv.source import StageOrder


@dataclass
class Peer:
    """A peer as it published itself: one encoded `RankExport` per rank, and its lease table."""

    worker_id: str
    generation: int
    ranks: list[bytes]
    leases: bytes


@dataclass
class HandoffMetadata(KVConnectorMetadata):
    """Orders for the worker side, carried out at the start of the step's loads, in this order.

    `ended` are vLLM request ids whose lease is over: reported as sent in the same step.
    """

    peers_up: list[Peer] = field(default_factory=list)
    peers_down: list[tuple[str, int]] = field(default_factory=list)
    unused: list[tuple[str, int, LeaseRef]] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    stages: list[StageOrder] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(
            (self.peers_up, self.peers_down, self.unused, self.pulls, self.cancels, self.stages)
        )


@dataclass
class PullReport(KVConnectorWorkerMetadata):
    """What the ranks have to say after a step: how the pulls that ended went, one result per rank
    and pull, and which leases (with the rank) have been staged. `mapped` holds, of the ranks where
    it has changed, how many peers are mapped and how many of a dead peer's mappings are left."""

    results: list[PullResult]
    staged: list[tuple[LeaseRef, int]]
    mapped: dict[int, tuple[int, int]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, PullReport)
        return PullReport(
            self.results + other.results,
            self.staged + other.staged,
            self.mapped | other.mapped,
        )


@dataclass
class ExportMetadata(KVConnectorHandshakeMetadata):
    """One rank's KV memory as peers can map it, encoded (`worker/kv`)."""

    export: bytes
    kv_bytes: int
    transport: str
    device: str
