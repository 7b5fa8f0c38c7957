"""Pulls between two processes: right bytes, or a failure that says why, and the lease let go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import torch

from tests.unit.kv_box import (
    ExporterProcess,
    Results,
    geometry,
    naive_copy,
    open_files,
    random_bytes,
    shm_mappings,
)
from tinfer.worker.kv.geometry import CopyPlan, Geometry
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.puller import Pull, Puller, PullResult
from tinfer.worker.kv.shm_transport import ShmTransport
from tinfer.worker.kv.source import SourceBlocks
from tinfer.worker.kv.transport import PeerMemory, ShmExport

SOURCE = geometry(num_blocks=16, num_layers=3, page_bytes=1024)
TARGET = geometry(num_blocks=12, num_layers=3, page_bytes=1024, offset_bytes=64)
SRC_BLOCKS, DST_BLOCKS = ((3, 4, 9, 0),), ((7, 8, 1, 11),)


class HookedTransport(ShmTransport):
    """Lets a test act at the worst moment: right before or right after the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.num_maps = 0

    def map(self, export: object, geometry: Geometry) -> PeerMemory:
        self.num_maps += 1
        return super().map(export, geometry)  # type: ignore[arg-type]

    def copy(
        self,
        peer: PeerMemory,
        plan: CopyPlan,
        dst: torch.Tensor,
        after: torch.cuda.Event | None = None,
    ) -> None:
        self.before()
        super().copy(peer, plan, dst, after)
        self.after()


class Reader:
    """A decode worker's side: a destination buffer and a puller over it."""

    def __init__(self, target: Geometry = TARGET, max_pending: int = 64) -> None:
        self.before = random_bytes(target.total_bytes, 2)
        self.memory = torch.from_numpy(self.before.copy())
        self.results = Results()
        self.transport = HookedTransport()
        self.puller = Puller(
            self.transport, self.memory, target, self.results.wake, max_pending=max_pending
        )

    def pull(self, lease: LeaseRef, **changes: object) -> PullResult:
        self.puller.submit(a_pull(lease, **changes))
        return self.results.next(self.puller)

    def has_copied(self, exporter_seed: int = 1) -> bool:
        source = random_bytes(SOURCE.total_bytes, exporter_seed)
        expected = naive_copy(SOURCE, TARGET, SRC_BLOCKS, DST_BLOCKS, source, self.before)
        return np.array_equal(self.memory.numpy(), expected)


def a_pull(lease: LeaseRef, **changes: object) -> Pull:
    pull = Pull("r", "p", 1, lease, SourceBlocks(SRC_BLOCKS), DST_BLOCKS)
    return msgspec.structs.replace(pull, **changes)


@pytest.fixture(scope="module")
def shared_exporter() -> Iterator[ExporterProcess]:
    process = ExporterProcess(SOURCE, seed=1)
    yield process
    process.close()


@pytest.fixture
def exporter(shared_exporter: ExporterProcess) -> ExporterProcess:
    shared_exporter.reset()
    return shared_exporter


@pytest.fixture
def reader() -> Iterator[Reader]:
    files, mappings, threads = open_files(), shm_mappings(), threading.active_count()
    reader = Reader()
    yield reader
    reader.puller.close()
    assert (reader.puller.num_mapped, reader.puller.num_pending) == (0, 0)
    assert (open_files(), shm_mappings(), threading.active_count()) == (files, mappings, threads)


def test_a_pull_copies_the_blocks_and_ends_the_lease(
    exporter: ExporterProcess, reader: Reader
) -> None:
    lease, other = exporter.open_lease(), exporter.open_lease()
    reader.puller.add_peer(exporter.peer())
    result = reader.pull(lease)
    assert (result.ok, result.reason, result.request_id) == (True, "", "r")
    assert result.num_bytes == 4 * 3 * 1024
    assert result.finished_ns >= result.started_ns > 0
    assert reader.has_copied()
    assert exporter.ended() == [lease]

    assert reader.pull(other).ok
    assert (reader.transport.num_maps, reader.puller.num_mapped) == (1, 1), "mapped once"
    assert exporter.ended() == [other]


def test_nothing_is_mapped_before_the_first_pull(exporter: ExporterProcess, reader: Reader) -> None:
    lease = exporter.open_lease()
    reader.puller.add_peer(exporter.peer())
    reader.puller.notify_unused("p", 1, lease)
    reader.puller.submit(a_pull(lease, request_id="after", generation=9))
    reader.results.next(reader.puller)  # tasks run in order: the notice has been handled
    assert exporter.ended() == [lease]
    assert (reader.transport.num_maps, reader.puller.num_mapped) == (0, 0)


def test_a_lease_that_was_over_before_the_copy_fails_and_copies_nothing(
    exporter: ExporterProcess, reader: Reader
) -> None:
    lease = exporter.open_lease()
    reader.puller.add_peer(exporter.peer())
    exporter.reuse_blocks()
    result = reader.pull(lease)
    assert not result.ok and result.reason.startswith("StaleLease: the lease had ended before")
    assert np.array_equal(reader.memory.numpy(), reader.before)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_blocks_reused_during_the_copy_are_a_failed_load(
    exporter: ExporterProcess, reader: Reader, moment: str
) -> None:
    lease = exporter.open_lease()
    reader.puller.add_peer(exporter.peer())
    setattr(reader.transport, moment, exporter.reuse_blocks)
    result = reader.pull(lease)
    assert not result.ok and result.reason == "StaleLease: the lease ended during the copy"
    setattr(reader.transport, moment, lambda: None)
    fresh = exporter.open_lease()
    assert exporter.ended() == [], "the failed pull did not end the slot's next lease"
    assert reader.pull(fresh).reason == "" and exporter.ended() == [fresh]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_exporter_killed_during_the_copy_costs_nothing_in_shared_memory(
    reader: Reader, moment: str
) -> None:
    exporter = ExporterProcess(SOURCE, seed=1)
    lease, second = exporter.open_lease(), exporter.open_lease()
    reader.puller.add_peer(exporter.peer())
    setattr(reader.transport, moment, exporter.kill)
    assert reader.pull(lease).ok
    assert reader.has_copied()

    setattr(reader.transport, moment, lambda: None)
    reader.memory.copy_(torch.from_numpy(reader.before))
    assert reader.pull(second).ok, "the mapping outlives the process"
    assert reader.has_copied()


def test_an_exporter_killed_before_the_first_pull_is_gone(reader: Reader) -> None:
    exporter = ExporterProcess(SOURCE, seed=1)
    lease = exporter.open_lease()
    reader.puller.add_peer(exporter.peer())
    exporter.kill()
    result = reader.pull(lease)
    assert not result.ok and result.reason.startswith("PeerGone: cannot open /proc/")
    assert np.array_equal(reader.memory.numpy(), reader.before)


def test_another_geometry_is_refused_by_field_and_the_lease_ends(
    exporter: ExporterProcess, reader: Reader
) -> None:
    lease = exporter.open_lease()
    wrong = msgspec.structs.replace(SOURCE, model_hash="other")
    reader.puller.add_peer(msgspec.structs.replace(exporter.peer(), geometry=wrong))
    result = reader.pull(lease)
    assert not result.ok and "KV geometry differs in model_hash" in result.reason
    assert exporter.ended() == [lease]


def test_a_geometry_larger_than_the_memory_is_refused(
    exporter: ExporterProcess, reader: Reader
) -> None:
    lease = exporter.open_lease()
    wide = msgspec.structs.replace(SOURCE, total_bytes=SOURCE.total_bytes + 1)
    reader.puller.add_peer(msgspec.structs.replace(exporter.peer(), geometry=wide))
    assert "TransportUnavailable: the peer's geometry spans" in reader.pull(lease).reason
    assert exporter.ended() == [lease]


@pytest.mark.parametrize(
    "changes",
    [
        {"source": SourceBlocks(((3, 4, 9, 99),))},
        {"source": SourceBlocks(((3,),))},
        {"source": SourceBlocks(())},
        {"dst_blocks": ((7, 8, 1, 12),)},
    ],
)
def test_blocks_that_do_not_exist_are_a_failed_pull(
    exporter: ExporterProcess, reader: Reader, changes: dict[str, object]
) -> None:
    lease = exporter.open_lease()
    reader.puller.add_peer(exporter.peer())
    result = reader.pull(lease, **changes)
    assert not result.ok and result.reason.startswith("ValueError")
    assert np.array_equal(reader.memory.numpy(), reader.before)
    assert exporter.ended() == [lease]


@pytest.mark.parametrize("lease", [LeaseRef(999, 1), LeaseRef(-1, 1), LeaseRef(0, 0)])
def test_a_lease_that_cannot_exist_is_a_failed_pull(
    exporter: ExporterProcess, reader: Reader, lease: LeaseRef
) -> None:
    reader.puller.add_peer(exporter.peer())
    assert reader.pull(lease).reason.startswith("StaleLease")


def test_peers_are_known_by_worker_and_generation(
    exporter: ExporterProcess, reader: Reader
) -> None:
    lease = exporter.open_lease()
    assert "no worker p of generation 1" in reader.pull(lease).reason
    reader.puller.add_peer(exporter.peer(generation=1))
    assert reader.pull(lease).ok
    reader.puller.add_peer(exporter.peer(generation=2))
    lease = exporter.open_lease()
    assert "no worker p of generation 1" in reader.pull(lease, generation=1).reason
    assert reader.puller.num_mapped == 0, "a new generation unmaps the old one"
    assert reader.pull(lease, generation=2).ok
    assert reader.puller.num_mapped == 1


def test_dropping_a_peer_unmaps_it_after_the_pulls_before_it(
    exporter: ExporterProcess, reader: Reader
) -> None:
    first, second = exporter.open_lease(), exporter.open_lease()
    copying, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        copying.set()
        assert go_on.wait(20)

    reader.transport.before = hold
    reader.puller.add_peer(exporter.peer())
    reader.puller.submit(a_pull(first))
    assert copying.wait(20)
    reader.puller.drop_peer("p", 1)
    reader.puller.submit(a_pull(second, request_id="s"))
    assert (reader.puller.num_mapped, reader.puller.num_stale) == (1, 1)
    go_on.set()
    assert reader.results._num_ready.acquire(timeout=20)
    assert reader.results._num_ready.acquire(timeout=20)
    done = {result.request_id: result.ok for result in reader.puller.poll()}
    assert done == {"r": True, "s": False}
    assert (reader.puller.num_mapped, reader.puller.num_stale) == (0, 0)


class Busy:
    """Holds the puller inside a copy, so that what is submitted meanwhile stays queued."""

    def __init__(self, reader: Reader, exporter: ExporterProcess) -> None:
        copying, self._go_on = threading.Event(), threading.Event()

        def hold() -> None:
            copying.set()
            assert self._go_on.wait(20)

        reader.transport.before = hold
        reader.puller.add_peer(exporter.peer())
        reader.puller.submit(a_pull(exporter.open_lease(), request_id="busy"))
        assert copying.wait(20)

    def go_on(self) -> None:
        self._go_on.set()


def test_a_queued_pull_can_be_cancelled_and_a_running_one_goes_on(
    exporter: ExporterProcess, reader: Reader
) -> None:
    busy = Busy(reader, exporter)
    lease = exporter.open_lease()
    reader.puller.submit(a_pull(lease))
    reader.puller.cancel("busy")
    reader.puller.cancel("unheard of")
    reader.puller.cancel("r")
    cancelled = reader.results.next(reader.puller)
    assert (cancelled.request_id, cancelled.ok, cancelled.reason) == ("r", False, "cancelled")
    busy.go_on()
    assert reader.results.next(reader.puller).ok
    reader.puller.close()
    assert lease in exporter.ended()


def test_pulls_beyond_the_bound_fail_at_once(exporter: ExporterProcess) -> None:
    reader = Reader(max_pending=2)
    busy = Busy(reader, exporter)
    leases = [exporter.open_lease() for _ in range(2)]
    for index, lease in enumerate(leases):
        reader.puller.submit(a_pull(lease, request_id=str(index)))
    refused = reader.results.next(reader.puller)
    assert (refused.request_id, refused.reason) == ("1", "2 pulls are pending already")
    busy.go_on()
    reader.puller.close()
    assert {result.request_id for result in reader.puller.poll()} == {"busy", "0"}
    assert set(leases) <= set(exporter.ended())


def test_closing_answers_what_is_queued_and_what_comes_later(
    exporter: ExporterProcess, reader: Reader
) -> None:
    busy = Busy(reader, exporter)
    lease = exporter.open_lease()
    reader.puller.submit(a_pull(lease))
    threading.Timer(0, busy.go_on).start()
    reader.puller.close()
    results = {result.request_id: result for result in reader.puller.poll()}
    assert results["busy"].ok
    assert results["r"].ok or results["r"].reason == "the puller was closed"
    assert lease in exporter.ended()
    reader.puller.submit(a_pull(lease, request_id="late"))
    (late,) = reader.puller.poll()
    assert (late.request_id, late.reason) == ("late", "the puller is closed")


def test_a_defect_ends_the_thread_but_leaves_no_pull_unanswered(
    exporter: ExporterProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    reader = Reader()
    busy = Busy(reader, exporter)

    def break_down() -> None:
        raise KeyError("a defect")

    reader.transport.after = break_down
    queued = exporter.open_lease()
    reader.puller.submit(a_pull(queued))
    busy.go_on()
    reader.puller.close()
    results = {result.request_id: result.reason for result in reader.puller.poll()}
    assert results == {"busy": "the puller broke", "r": "the puller was closed"}
    assert seen == [KeyError]
    assert queued in exporter.ended()
    assert reader.puller.num_mapped == 0


def test_an_export_of_another_kind_is_refused(exporter: ExporterProcess, reader: Reader) -> None:
    from tinfer.worker.kv.transport import HostExport

    lease = exporter.open_lease()
    info = exporter.peer()
    assert isinstance(info.export, ShmExport)
    other = HostExport(info.export.memory, num_slots=4)
    reader.puller.add_peer(msgspec.structs.replace(info, export=other))
    assert "the peer exports HostExport, not shm" in reader.pull(lease).reason
