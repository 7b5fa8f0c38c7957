"""Hand-offs between two processes on one GPU, by both GPU transports.

Needs torch, numpy, msgspec and pytest only, so that `bin/gpu-check` runs it on a bare machine.
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
import torch

from tests.gpu.kv_gpu_exporter import Ended, Hold, Order, Reuse
from tests.unit.kv_box import (
    Results,
    geometry,
    naive_copy,
    open_files,
    random_bytes,
    shm_mappings,
)
from tinfer.worker.kv.cuda_ipc import CudaIpcTransport
from tinfer.worker.kv.device_copy import DeviceCopier, Strategy
from tinfer.worker.kv.geometry import CopyPlan, Geometry, copy_plan
from tinfer.worker.kv.host_transport import HostTransport
from tinfer.worker.kv.lease import LeaseRef
from tinfer.worker.kv.probe import choose_transport, probe_cuda_ipc
from tinfer.worker.kv.puller import PeerInfo, Pull, Puller, PullResult
from tinfer.worker.kv.source import SourceBlocks
from tinfer.worker.kv.transport import PeerMemory, Transport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

T = TypeVar("T")
SOURCE = geometry(num_blocks=64, num_layers=4, page_bytes=8192)
TARGET = geometry(num_blocks=48, num_layers=4, page_bytes=8192, offset_bytes=4096)


class GpuExporter:
    """`kv_gpu_exporter` in its process."""

    def __init__(self, transport: str, layout: Geometry, seed: int = 1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.kv_gpu_exporter", transport, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.peer = self._ask(layout, PeerInfo)

    def hold(self, blocks: list[list[int]]) -> tuple[LeaseRef, SourceBlocks]:
        return self._ask(Hold(blocks), tuple[LeaseRef, SourceBlocks])

    def ended(self) -> list[LeaseRef]:
        return self._ask(Ended(), list[LeaseRef])

    def reuse_blocks(self) -> None:
        self._ask(Reuse(), bool)

    def _ask(self, order: Order | Geometry, answer: type[T]) -> T:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(msgspec.json.encode(order) + b"\n")
        stdin.flush()
        return msgspec.json.decode(stdout.readline(), type=answer)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(60)


class GpuReader:
    """A decode worker's side on the GPU, with a hook around each copy."""

    def __init__(self, kind: str, target: Geometry = TARGET) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.transport = _transport(kind, device)
        self.before = random_bytes(target.total_bytes, 2)
        self.target = target
        self.memory = torch.from_numpy(self.before).to(device)
        self.results = Results()
        self.puller = Puller(self.transport, self.memory, target, self.results.wake)
        self.hook: Callable[[], None] = lambda: None
        self._hook_copy()

    def _hook_copy(self) -> None:
        copy = self.transport.copy

        def hooked(peer: PeerMemory, plan: CopyPlan, dst: torch.Tensor, after: Any = None) -> None:
            copy(peer, plan, dst, after)
            self.hook()

        self.transport.copy = hooked  # type: ignore[method-assign]

    def pull(self, held: tuple[LeaseRef, SourceBlocks], dst_blocks: list[list[int]]) -> PullResult:
        lease, source = held
        blocks = tuple(tuple(group) for group in dst_blocks)
        self.puller.submit(Pull("r", "p", 1, lease, source, blocks))
        return self.results.next(self.puller)

    def close(self) -> None:
        self.puller.close()
        self.transport.close()


def _transport(kind: str, device: torch.device) -> Transport:
    name, _, strategy = kind.partition(":")
    if name == "host":
        return HostTransport(device)
    return CudaIpcTransport(device, strategy=strategy or None)  # type: ignore[arg-type]


def fragments(num_blocks: int, count: int, seed: int) -> list[list[int]]:
    return [random.Random(seed).sample(range(num_blocks), count)]


KINDS = ["cuda-ipc:gather", "cuda-ipc:loop", "host"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def exporter(kind: str) -> Iterator[GpuExporter]:
    process = GpuExporter(kind.partition(":")[0], SOURCE)
    yield process
    process.close()


@pytest.fixture
def reader(kind: str) -> Iterator[GpuReader]:
    reader = GpuReader(kind)
    yield reader
    reader.close()


def test_fragmented_blocks_arrive_whole(exporter: GpuExporter, reader: GpuReader) -> None:
    reader.puller.add_peer(exporter.peer)
    want, source = reader.before, random_bytes(SOURCE.total_bytes, 1)
    for seed in range(5):
        src_blocks, dst_blocks = fragments(64, 40, seed), fragments(48, 40, seed + 9)
        held = exporter.hold(src_blocks)
        result = reader.pull(held, dst_blocks)
        assert result.ok, result.reason
        want = naive_copy(SOURCE, TARGET, src_blocks, dst_blocks, source, want)
        assert np.array_equal(reader.memory.cpu().numpy(), want)
        assert exporter.ended() == [held[0]]
    assert reader.puller.num_mapped == 1


def test_blocks_reused_during_the_copy_are_a_failed_load(
    exporter: GpuExporter, reader: GpuReader
) -> None:
    reader.puller.add_peer(exporter.peer)
    reader.hook = exporter.reuse_blocks
    result = reader.pull(exporter.hold([[1, 2]]), [[3, 4]])
    assert (result.ok, result.reason) == (False, "StaleLease: the lease ended during the copy")


def test_a_lease_that_was_over_copies_nothing(exporter: GpuExporter, reader: GpuReader) -> None:
    reader.puller.add_peer(exporter.peer)
    held = exporter.hold([[1, 2]])
    exporter.reuse_blocks()
    assert reader.pull(held, [[3, 4]]).reason.startswith("StaleLease")
    assert np.array_equal(reader.memory.cpu().numpy(), reader.before)


def test_what_a_dead_exporter_leaves_is_trusted_only_in_host_memory(
    kind: str, exporter: GpuExporter, reader: GpuReader
) -> None:
    reader.puller.add_peer(exporter.peer)
    reader.hook = exporter.kill
    result = reader.pull(exporter.hold([[1, 2]]), [[3, 4]])
    if kind == "host":
        assert result.ok, result.reason
        want = naive_copy(
            SOURCE, TARGET, [[1, 2]], [[3, 4]], random_bytes(SOURCE.total_bytes, 1), reader.before
        )
        assert np.array_equal(reader.memory.cpu().numpy(), want)
    else:
        assert result.reason == "PeerGone: worker p died during the copy"


def test_an_exporter_killed_before_the_first_pull_is_gone(
    exporter: GpuExporter, reader: GpuReader
) -> None:
    reader.puller.add_peer(exporter.peer)
    held = exporter.hold([[1, 2]])
    exporter.kill()
    assert reader.pull(held, [[3, 4]]).reason.startswith("PeerGone")


def test_memory_files_and_mappings_return_to_level(kind: str) -> None:
    free_bytes = []
    for _ in range(3):
        files, mappings = open_files(), shm_mappings()
        exporter, reader = GpuExporter(kind.partition(":")[0], SOURCE), GpuReader(kind)
        reader.puller.add_peer(exporter.peer)
        result = reader.pull(exporter.hold([[1, 2]]), [[3, 4]])
        assert result.ok, result.reason
        reader.close()
        exporter.close()
        del reader
        gc.collect()
        torch.cuda.empty_cache()
        assert (open_files(), shm_mappings()) == (files, mappings)
        free_bytes.append(torch.cuda.mem_get_info()[0])
    # The first round loads kernels and makes streams, which stay.
    assert free_bytes[2] >= free_bytes[1] - (2 << 20), free_bytes


@pytest.mark.parametrize("strategy", ["gather", "loop"])
def test_a_copy_waits_for_the_work_queued_before_it(strategy: Strategy) -> None:
    """The destination may still be written by a step that was queued earlier."""
    device = torch.device("cuda", torch.cuda.current_device())
    copier = DeviceCopier(device, strategy=strategy)
    layout = geometry(num_blocks=8, num_layers=2, page_bytes=1 << 20)
    src = torch.full((layout.total_bytes,), 7, dtype=torch.int8, device=device)
    dst = torch.zeros(layout.total_bytes, dtype=torch.int8, device=device)
    plan = copy_plan(layout, layout, [list(range(8))], [list(reversed(range(8)))])
    torch.cuda.synchronize()
    compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(compute):
        torch.cuda._sleep(10**8)  # type: ignore[no-untyped-call]  # 50 ms or more
        dst.fill_(1)
        fence = copier.fence()
    copier.copy(src, dst, plan, fence)
    torch.cuda.synchronize()
    assert bool((dst == 7).all())


def test_staging_is_reported_only_when_it_has_happened() -> None:
    """See `HostTransport.staged`: no lease becomes ready before its bytes are in the pool."""
    from tinfer.worker.kv.source import StagedSource

    device = torch.device("cuda", torch.cuda.current_device())
    transport, pool = HostTransport(device, num_slots=64), StagedSource(64)
    kv = torch.from_numpy(random_bytes(SOURCE.total_bytes, 1)).to(device)
    transport.export(kv, SOURCE)
    blocks = [list(range(0, 64, 2))]
    order = pool.order(LeaseRef(0, 1), blocks, pool.prepare(blocks))
    assert order is not None
    transport.stage(order)
    deadline_s = time.monotonic() + 20
    while not (done := transport.staged()):
        assert time.monotonic() < deadline_s
    assert done == [LeaseRef(0, 1)]
    transport.close()


def test_the_probe_finds_what_works_here() -> None:
    result = probe_cuda_ipc(0, 0)
    name, _ = choose_transport("auto", "cuda", [0])
    assert name == ("cuda-ipc" if result.ok else "host")
    assert (result.gb_per_s > 0) == result.ok
