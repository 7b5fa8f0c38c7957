"""The exact account of leases and pulls: each is opened once and ended once.

A lease moves WAITING → READING → READ, or to RELEASED from any of them, back to WAITING when its
reader died, and leaves the account when its owner has freed the blocks or is dead. Its invariant:
RELEASED is reached only when no reader was told of the lease, the reader has stopped, or the reader
is seen dead.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

from tinfer.core.types import LeaseKey
from tinfer.core.worker import Worker


class LedgerError(RuntimeError):
    """An account of ours does not add up."""


class LeaseState(enum.Enum):
    """WAITING: no reader yet. READING: one was told. READ: it has stopped. RELEASED: owner told."""

    WAITING = "waiting"
    READING = "reading"
    READ = "read"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class Lease:
    """Blocks that `owner` keeps, for the request of that id or (None) for nobody."""

    key: LeaseKey
    request_id: str | None
    num_blocks: int
    owner: Worker
    reader: Worker | None = None
    state: LeaseState = LeaseState.WAITING
    # A reader was told of it and died: its owner may have seen that one stop.
    is_offered_again: bool = False


class Ledger:
    """Open leases by key, by owner and by reader, and the pulls in flight."""

    def __init__(self) -> None:
        self._leases: dict[LeaseKey, Lease] = {}
        self._by_request: dict[str, Lease] = {}
        self._by_owner: dict[Worker, dict[LeaseKey, Lease]] = {}
        self._by_reader: dict[Worker, dict[LeaseKey, Lease]] = {}
        self._pulls: set[str] = set()

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_pulls(self) -> int:
        return len(self._pulls)

    def num_by_owner(self) -> dict[tuple[str, str], int]:
        """Open leases by the owner's worker_id and their state, where there are any."""
        leases = self._leases.values()
        return dict(Counter((one.owner.id, one.state.value) for one in leases))

    def get(self, key: LeaseKey) -> Lease | None:
        """The open lease of that key."""
        return self._leases.get(key)

    def of_request(self, request_id: str) -> Lease | None:
        """The open lease that was made for that request."""
        return self._by_request.get(request_id)

    def open(self, key: LeaseKey, owner: Worker, num_blocks: int, request_id: str | None) -> Lease:
        """Enter a lease. Raises `LedgerError` if it is open already or is not the owner's."""
        if key in self._leases:
            raise LedgerError(f"{key}: opened twice")
        if (key.worker_id, key.worker_generation) != (owner.id, owner.generation):
            raise LedgerError(f"{key}: reported by {owner.id} generation {owner.generation}")
        lease = Lease(key, request_id, num_blocks, owner)
        self._leases[key] = lease
        self._by_owner.setdefault(owner, {})[key] = lease
        if request_id is not None:
            self._by_request[request_id] = lease
        owner.num_held_blocks += num_blocks
        return lease

    def start_read(self, lease: Lease, reader: Worker) -> None:
        """A reader is told of the lease. Raises `LedgerError` unless the lease waits for one."""
        if lease.state is not LeaseState.WAITING:
            raise LedgerError(f"{lease.key}: read while {lease.state.value}")
        lease.state = LeaseState.READING
        lease.reader = reader
        self._by_reader.setdefault(reader, {})[lease.key] = lease

    def offer_again(self, lease: Lease) -> None:
        """The reader is seen dead, and another may read what is still held.

        The dead one may have said that it stopped: then the owner frees the blocks all the same,
        and a reader that comes too late sees by the lease's generation that it read something else.
        Raises `LedgerError` unless it was being read.
        """
        if lease.state is not LeaseState.READING or lease.reader is None:
            raise LedgerError(f"{lease.key}: offered again while {lease.state.value}")
        _drop(self._by_reader, lease.reader, lease.key)
        lease.reader = None
        lease.state = LeaseState.WAITING
        lease.is_offered_again = True

    def stop_read(self, request_id: str, reader: Worker) -> None:
        """The reader has stopped; nothing to do where the owner's own word came first."""
        lease = self._by_request.get(request_id)
        reading = lease is not None and lease.state is LeaseState.READING
        if lease is not None and reading and lease.reader is reader:
            lease.state = LeaseState.READ

    def release(self, lease: Lease) -> LeaseKey:
        """The owner is to be told to end the lease of that key. Raises `LedgerError` the second
        time."""
        if lease.state is LeaseState.RELEASED:
            raise LedgerError(f"{lease.key}: released twice")
        lease.state = LeaseState.RELEASED
        return lease.key

    def end(self, key: LeaseKey) -> None:
        """The owner has freed the blocks.

        Raises `LedgerError` if the lease is not open, or if nobody has read or released it.
        """
        lease = self._leases.get(key)
        if lease is None:
            raise LedgerError(f"{key}: ended, but not open")
        if lease.state is LeaseState.WAITING and not lease.is_offered_again:
            raise LedgerError(f"{key}: ended, but neither read nor released")
        self._remove(lease)

    def end_all_of(self, owner: Worker) -> list[Lease]:
        """The owner is dead, and so are its leases: close their accounts and return them."""
        leases = list(self._by_owner.get(owner, {}).values())
        for lease in leases:
            self._remove(lease)
        return leases

    def read_by(self, reader: Worker) -> list[Lease]:
        """Open leases of which that incarnation was told."""
        return list(self._by_reader.get(reader, {}).values())

    def start_pull(self, request_id: str) -> None:
        """Raises `LedgerError` if this request is being pulled already."""
        if request_id in self._pulls:
            raise LedgerError(f"{request_id}: pulled twice")
        self._pulls.add(request_id)

    def stop_pull(self, request_id: str) -> None:
        """The pull is over, or the request is, or its worker; the first word counts."""
        self._pulls.discard(request_id)

    def _remove(self, lease: Lease) -> None:
        del self._leases[lease.key]
        if lease.request_id is not None and self._by_request.get(lease.request_id) is lease:
            del self._by_request[lease.request_id]
        _drop(self._by_owner, lease.owner, lease.key)
        if lease.reader is not None:
            _drop(self._by_reader, lease.reader, lease.key)
        lease.owner.num_held_blocks -= lease.num_blocks


def _drop(index: dict[Worker, dict[LeaseKey, Lease]], worker: Worker, key: LeaseKey) -> None:
    del index[worker][key]
    if not index[worker]:
        del index[worker]
