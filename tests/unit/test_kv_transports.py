"""The GPU transports' own logic, on CPU tensors: handles, staging, refusals, choice by probe."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.unit.kv_box import (
    Results,
    geometry,
    naive_copy,
    open_files,
    random_bytes,
    shm_mappings,
)
from tinfer.worker.kv import probe
from tinfer.worker.kv.cuda_driver import HANDLE_BYTES
from tinfer.worker.kv.cuda_ipc import CudaIpcTransport
from tinfer.worker.kv.device_copy import DeviceCopier
from tinfer.worker.kv.errors import KVMemoryError, PeerGone, TransportUnavailable
from tinfer.worker.kv.geometry import copy_plan
from tinfer.worker.kv.host_transport import HostTransport
from tinfer.worker.kv.lease import LeaseRef, LeaseTable
from tinfer.worker.kv.probe import (
    ProbeResult,
    build_transport,
    choose_transport,
    probe_cuda_ipc,
)
from tinfer.worker.kv.puller import PeerInfo, Pull, Puller
from tinfer.worker.kv.shm_transport import ShmTransport
from tinfer.worker.kv.source import DirectSource, StagedSource, StageOrder
from tinfer.worker.kv.transport import CudaIpcExport, Export, HostExport, ShmExport, Transport

CPU = torch.device("cpu")
SOURCE = geometry(num_blocks=16, num_layers=3, page_bytes=1024)
TARGET = geometry(num_blocks=12, num_layers=3, page_bytes=1024)
SRC_BLOCKS, DST_BLOCKS = ((3, 4, 9, 0, 5),), ((7, 8, 1, 11, 2),)


class LocalDriver:
    """Hands out handles to this process's own memory; counts what is open."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.obstacle: str | None = None

    def device_uuid(self, device: torch.device) -> str:
        return f"GPU-{device}"

    def why_unreachable(self, device: torch.device, peer_uuid: str) -> str | None:
        assert peer_uuid == self.device_uuid(CPU)
        return self.obstacle

    def export_handle(self, device: torch.device, address: int) -> tuple[bytes, int]:
        base = address - 512  # as if the buffer lay inside a larger allocation
        return base.to_bytes(8, "little").ljust(HANDLE_BYTES, b"\0"), 512

    def open_handle(self, device: torch.device, handle: bytes) -> int:
        self.open.append(int.from_bytes(handle[:8], "little"))
        return self.open[-1]

    def close_handle(self, device: torch.device, address: int) -> None:
        self.open.remove(address)


def expected(before: torch.Tensor) -> np.ndarray:
    source = random_bytes(SOURCE.total_bytes, 1)
    return naive_copy(SOURCE, TARGET, SRC_BLOCKS, DST_BLOCKS, source, before.numpy())


def test_cuda_ipc_maps_by_handle_and_offset_and_copies() -> None:
    driver = LocalDriver()
    owner, reader = CudaIpcTransport(CPU, driver=driver), CudaIpcTransport(CPU, driver=driver)
    source = torch.from_numpy(random_bytes(SOURCE.total_bytes, 1))
    export = through_the_wire(owner.export(source, SOURCE))
    target = torch.from_numpy(random_bytes(TARGET.total_bytes, 2))
    want = expected(target)

    peer = reader.map(export, SOURCE)
    assert len(driver.open) == 1 and peer.is_trusted() and peer.geometry == SOURCE
    reader.copy(peer, copy_plan(SOURCE, TARGET, SRC_BLOCKS, DST_BLOCKS), target)
    assert np.array_equal(target.numpy(), want)
    reader.unmap(peer)
    assert driver.open == []


def through_the_wire(export: Export) -> Export:
    decoded: Export = msgspec.msgpack.decode(msgspec.msgpack.encode(export), type=Export)
    return decoded


def an_ipc_export(owner: CudaIpcTransport) -> CudaIpcExport:
    export = owner.export(torch.zeros(SOURCE.total_bytes, dtype=torch.int8), SOURCE)
    assert isinstance(export, CudaIpcExport)
    return export


def test_cuda_ipc_refuses_what_it_cannot_map() -> None:
    driver = LocalDriver()
    transport = CudaIpcTransport(CPU, driver=driver)
    export = an_ipc_export(transport)
    wide = msgspec.structs.replace(SOURCE, total_bytes=SOURCE.total_bytes + 1)
    with pytest.raises(TransportUnavailable, match="geometry spans"):
        transport.map(export, wide)
    with pytest.raises(TransportUnavailable, match="not export a CUDA IPC handle"):
        transport.map(msgspec.structs.replace(export, handle=b"short"), SOURCE)
    with pytest.raises(PeerGone, match="has ended"):
        transport.map(msgspec.structs.replace(export, start_time_ticks=1), SOURCE)
    driver.obstacle = "GPU 1 has no peer access to GPU 0"
    with pytest.raises(TransportUnavailable, match="no peer access"):
        transport.map(export, SOURCE)
    with pytest.raises(TransportUnavailable, match="geometry spans"):
        transport.export(torch.zeros(10, dtype=torch.int8), SOURCE)
    assert driver.open == []


def test_gpu_memory_of_a_dead_owner_is_not_trusted() -> None:
    transport = CudaIpcTransport(CPU, driver=LocalDriver())
    export = an_ipc_export(transport)
    peer = transport.map(export, SOURCE)
    assert peer.is_trusted()
    peer._export = msgspec.structs.replace(export, start_time_ticks=1)  # type: ignore[attr-defined]
    assert not peer.is_trusted()


@pytest.mark.parametrize("alive", [True, False])
def test_a_pull_from_an_owner_that_died_meanwhile_fails(
    alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinfer.worker.kv.cuda_ipc.CudaIpcPeer.is_trusted", lambda peer: alive)
    transport, table, results = (
        CudaIpcTransport(CPU, driver=LocalDriver()),
        LeaseTable.create(2),
        Results(),
    )
    info = PeerInfo("p", 1, an_ipc_export(transport), SOURCE, table.descriptor())
    target = torch.zeros(TARGET.total_bytes, dtype=torch.int8)
    puller = Puller(transport, target, TARGET, results.wake)
    puller.add_peer(info)
    lease = table.open_lease(time.monotonic() + 60)
    puller.submit(Pull("r", "p", 1, lease, DirectSource().prepare(SRC_BLOCKS), DST_BLOCKS))
    result = results.next(puller)
    expected_reason = "" if alive else "PeerGone: worker p died during the copy"
    assert (result.ok, result.reason) == (alive, expected_reason)
    puller.close()
    table.close()


def test_direct_transports_stage_nothing() -> None:
    order = StageOrder(LeaseRef(0, 1), ((1,),), ((0,),))
    direct: list[Transport] = [ShmTransport(), CudaIpcTransport(CPU, driver=LocalDriver())]
    for transport in direct:
        assert transport.staged() == []
        with pytest.raises(ValueError, match="stages nothing"):
            transport.stage(order)


def test_host_blocks_are_pulled_once_they_are_staged() -> None:
    files, mappings = open_files(), shm_mappings()
    owner, pool = HostTransport(CPU, num_slots=6), StagedSource(6)
    table = LeaseTable.create(4)
    source = torch.from_numpy(random_bytes(SOURCE.total_bytes, 1))
    export = through_the_wire(owner.export(source, SOURCE))
    assert isinstance(export, HostExport)

    reader, results = HostTransport(CPU), Results()
    target = torch.from_numpy(random_bytes(TARGET.total_bytes, 2))
    want = expected(target)
    puller = Puller(reader, target, TARGET, results.wake)
    puller.add_peer(PeerInfo("p", 1, export, SOURCE, table.descriptor()))

    offered = pool.prepare(SRC_BLOCKS)
    lease = table.open_lease(time.monotonic() + 60, ready=not pool.needs_staging)
    puller.submit(Pull("r", "p", 1, lease, offered, DST_BLOCKS))
    order = pool.order(lease, SRC_BLOCKS, offered)
    assert order is not None and owner.staged() == []
    owner.stage(order)
    source.zero_()  # the staged copy stands on its own
    assert puller.poll() == [], "not marked ready yet"
    assert owner.staged() == [lease] and owner.staged() == []
    table.mark_ready(lease)
    result = results.next(puller)
    assert result.ok, result.reason
    assert np.array_equal(target.numpy(), want)
    assert table.poll()[0] == [lease]

    puller.close()
    reader.close()
    owner.close()
    table.close()
    assert (open_files(), shm_mappings()) == (files, mappings)


class Unready:
    """A pull that waits for staging that nobody does."""

    def __init__(self, deadline_s: float) -> None:
        self.owner, self.table = ShmTransport(), LeaseTable.create(4)
        export = self.owner.export(self.owner.allocate(SOURCE.total_bytes), SOURCE)
        self.info = PeerInfo("p", 1, export, SOURCE, self.table.descriptor())
        self.results = Results()
        target = torch.zeros(TARGET.total_bytes, dtype=torch.int8)
        self.puller = Puller(ShmTransport(), target, TARGET, self.results.wake)
        self.puller.add_peer(self.info)
        self.lease = self.table.open_lease(deadline_s, ready=False)
        source = StagedSource(8).prepare(((0,),))
        self.puller.submit(Pull("r", "p", 1, self.lease, source, ((1,),)))

    def close(self) -> None:
        self.puller.close()
        self.owner.close()
        self.table.close()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda box: box.table.close_lease(box.lease), "the lease had ended before the copy"),
        (lambda box: box.table.extend(box.lease, 0.0), "deadline passed before the blocks were"),
        (lambda box: box.puller.drop_peer("p", 1), "peer was dropped before the blocks were"),
        (lambda box: box.puller.cancel("r"), "cancelled"),
        (lambda box: box.puller.close(), "the puller was closed"),
    ],
)
def test_waiting_for_staging_ends(end: object, reason: str) -> None:
    box = Unready(time.monotonic() + 60)
    end(box)  # type: ignore[operator]
    result = box.results.next(box.puller)
    assert not result.ok and reason in result.reason
    box.puller.close()
    if box.table.num_open:
        assert box.table.poll()[0] == [box.lease]
    box.close()


def test_a_waiting_pull_does_not_hold_up_others() -> None:
    box = Unready(time.monotonic() + 60)
    lease = box.table.open_lease(time.monotonic() + 60)
    source = StagedSource(8).prepare(((0,),))
    box.puller.submit(Pull("other", "p", 1, lease, source, ((1,),)))
    result = box.results.next(box.puller)
    assert (result.request_id, result.ok) == ("other", True)
    box.close()


def test_the_shm_transport_exports_only_its_own_buffer() -> None:
    transport = ShmTransport()
    stranger = torch.zeros(SOURCE.total_bytes, dtype=torch.int8)
    with pytest.raises(TransportUnavailable, match="was not allocated in shared memory"):
        transport.export(stranger, SOURCE)
    context = transport.allocation_context()
    assert context is not None
    with context:
        buffer = torch.zeros(2 << 20, dtype=torch.int8, device="cpu")
    with pytest.raises(TransportUnavailable, match="is not the one in shared memory"):
        transport.export(stranger, SOURCE)
    with pytest.raises(TransportUnavailable, match="geometry spans"):
        transport.export(buffer, geometry(num_blocks=4096))
    with pytest.raises(ValueError, match="allocated already"):
        transport.allocate(10)
    export = transport.export(buffer.view(2, -1), SOURCE)
    assert isinstance(export, ShmExport) and export.memory.pid == os.getpid()
    transport.close()


def test_too_much_kv_memory_is_refused_before_it_is_taken() -> None:
    transport = ShmTransport()
    with pytest.raises(KVMemoryError, match="left under"):
        transport.allocate(1 << 62)
    transport.close()


def test_large_plans_are_gathered_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinfer.worker.kv.device_copy._TEMP_BYTES", 2048)
    source = torch.from_numpy(random_bytes(SOURCE.total_bytes, 1))
    target = torch.from_numpy(random_bytes(TARGET.total_bytes, 2))
    want = expected(target)
    plan = copy_plan(SOURCE, TARGET, SRC_BLOCKS, DST_BLOCKS)
    for copy in (
        DeviceCopier(CPU).copy,
        DeviceCopier(CPU).copy_in,
        DeviceCopier(CPU).start_copy_out,
    ):
        result = target.clone()
        copy(source, result, plan)
        assert np.array_equal(result.numpy(), want)


def test_an_injected_batch_copy_gets_absolute_addresses_of_all_ranges() -> None:
    calls: list[list[list[int]]] = []

    def batch(*columns: torch.Tensor) -> None:
        calls.append([column.tolist() for column in columns])

    source = torch.zeros(SOURCE.total_bytes, dtype=torch.int8)
    target = torch.zeros(TARGET.total_bytes, dtype=torch.int8)
    plan = copy_plan(SOURCE, TARGET, SRC_BLOCKS, DST_BLOCKS)
    DeviceCopier(CPU, batch, strategy="batch").copy(source, target, plan)
    assert calls == [
        [
            (plan.src_offsets + source.data_ptr()).tolist(),
            (plan.dst_offsets + target.data_ptr()).tolist(),
            plan.sizes.tolist(),
        ]
    ]


class TestChoice:
    @staticmethod
    def stand_in(ok: bool) -> tuple[list[tuple[int, int]], object]:
        asked: list[tuple[int, int]] = []

        def answer(pairs: list[tuple[int, int]]) -> list[ProbeResult]:
            asked.extend(pairs)
            return [ProbeResult(ok, "" if ok else "digest differs", 10.0) for _ in pairs]

        return asked, answer

    def test_every_ordered_pair_of_devices_is_tried(self) -> None:
        asked, answer = self.stand_in(True)
        name, reason = choose_transport("auto", "cuda", [0, 1, 2, 1], answer, {})  # type: ignore[arg-type]
        assert (name, "probed" in reason) == ("cuda-ipc", True)
        assert sorted(asked) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]

    def test_one_device_is_tried_against_itself(self) -> None:
        asked, answer = self.stand_in(True)
        assert choose_transport("cuda-ipc", "cuda", [3, 3], answer, {})[0] == "cuda-ipc"  # type: ignore[arg-type]
        assert asked == [(3, 3)]

    def test_a_failed_probe_means_host_or_an_error(self) -> None:
        _, answer = self.stand_in(False)
        name, reason = choose_transport("auto", "cuda", [0, 1], answer, {})  # type: ignore[arg-type]
        assert name == "host" and "GPU 1 cannot read GPU 0: digest differs" in reason
        with pytest.raises(TransportUnavailable, match="digest differs"):
            choose_transport("cuda-ipc", "cuda", [0, 1], answer, {})  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_expandable_segments_have_no_handle(self, name: str) -> None:
        asked, answer = self.stand_in(True)
        environ = {name: "max_split_size_mb:64, expandable_segments: True"}
        with pytest.raises(TransportUnavailable, match=f"{name} has expandable_segments"):
            choose_transport("cuda-ipc", "cuda", [0, 1], answer, environ)  # type: ignore[arg-type]
        assert choose_transport("auto", "cuda", [0], answer, environ)[0] == "host"  # type: ignore[arg-type]
        assert asked == [], "no need to try"

    @pytest.mark.parametrize(
        ("requested", "device_type", "message"),
        [
            ("cuda-ipc", "cpu", "cuda-ipc moves GPU memory"),
            ("host", "cpu", "host moves GPU memory"),
            ("shm", "cuda", "shm moves CPU memory"),
            ("rdma", "cpu", "no transport 'rdma'"),
        ],
    )
    def test_a_transport_that_cannot_fit_says_why(
        self, requested: str, device_type: str, message: str
    ) -> None:
        with pytest.raises(TransportUnavailable, match=message):
            choose_transport(requested, device_type, [0])

    def test_cpu_workers_share_memory(self) -> None:
        assert choose_transport("auto", "cpu", [])[0] == "shm"
        assert isinstance(build_transport("shm"), ShmTransport)
        assert isinstance(build_transport("host", CPU, num_staging_slots=2), HostTransport)
        with pytest.raises(TransportUnavailable, match="no transport 'rdma'"):
            build_transport("rdma", CPU)


def test_without_a_gpu_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe._own([(0, 1)]) == [ProbeResult(False, "torch sees no GPU", 0.0)]
    with pytest.raises(TransportUnavailable, match="torch sees none"):
        build_transport("cuda-ipc")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("#!/bin/sh\necho 'driver says no' >&2; exit 3\n", "ended with 3: driver says no"),
        ("#!/bin/sh\nkill -9 $$\n", "ended with -9: no message"),
        ("#!/bin/sh\nexec sleep 60\n", "took more than 1 s"),
    ],
)
def test_a_probe_that_fails_is_a_reason_and_no_exception(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(program)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(probe, "PROBE_TIMEOUT_S", 1.0 if "sleep" in program else 20.0)
    result = probe_cuda_ipc(0, 1)
    assert not result.ok and reason in result.reason


def test_the_verdicts_of_all_pairs_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of the probe on a stand-in for the child's answer."""
    answer = msgspec.json.encode([ProbeResult(True, "", 12.0), ProbeResult(False, "x", 0.0)])
    monkeypatch.setattr(probe, "_run_child", lambda args, stdin: answer)
    assert [result.ok for result in probe.probe_pairs([(0, 1), (1, 0)])] == [True, False]
