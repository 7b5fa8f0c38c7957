"""Errors of the KV hand-off.

KVError
├── GeometryMismatch       two workers' buffers cannot be copied into each other
├── KVMemoryError          the memory asked for is not there
├── LeaseNotOpen           an owner call names a lease that it does not hold open
├── LeaseTableFull         every slot of the table is in use
├── PeerGone               the peer process, or what it exported, no longer exists
├── StagingFull            the host staging pool has too few free slots
└── TransportUnavailable   a transport cannot work here, with the reason
"""


class KVError(RuntimeError):
    """Any failure of the KV hand-off that the caller can answer with a recompute or a refusal."""


class GeometryMismatch(KVError):
    """Two geometries differ in `field`, so their blocks are not interchangeable."""

    def __init__(self, field: str, mine: object, theirs: object) -> None:
        super().__init__(f"KV geometry differs in {field}: {mine!r} here, {theirs!r} at the peer")
        self.field = field


class KVMemoryError(KVError):
    """The memory asked for is not available, or could not be reserved."""


class LeaseNotOpen(KVError):
    """The owner named a lease that is not open."""


class LeaseTableFull(KVError):
    """Every slot of the lease table is in use."""


class PeerGone(KVError):
    """The peer process has ended, or no longer holds what it exported."""


class StagingFull(KVError):
    """The host staging pool cannot take the blocks; the hand-off fails and is recomputed."""


class TransportUnavailable(KVError):
    """A transport cannot be used on this machine; the message says why."""
