"""How fast a hand-off copies blocks, against memcpy of the same bytes.

A second process exports a KV buffer, this one maps it and copies blocks out of it with tinfer's
transport. Both buffers are fragmented first: an allocator with vLLM's first-in-first-out free list
serves 10,000 random requests of 1..64 blocks. Measured in turns, each on blocks of its own, so that
no measurement finds another's bytes in the cache:

  ours    the transport's copy of the blocks, in GB/s; planning is timed apart
  one     (a) the same number of bytes in one piece: memmove, or one device copy
  pieces  (b) as many pieces of one page, in one C loop (or one kernel): a strided copy of every
          second page of a region. An upper bound, since even distances suit the prefetcher better
          than scattered ones. Python's loop over memmove (`loop`) is given for comparison

On a CPU the transport is shm; on a GPU cuda-ipc (once per strategy) and host are measured.

    python benchmarks/handoff_copy.py --json handoff_copy.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tinfer.worker.kv.cuda_ipc import CudaIpcTransport
from tinfer.worker.kv.geometry import CopyPlan, Geometry, Region, copy_plan
from tinfer.worker.kv.host_transport import HostTransport
from tinfer.worker.kv.memory import ShmBuffer
from tinfer.worker.kv.shm_transport import ShmTransport
from tinfer.worker.kv.source import staging_geometry
from tinfer.worker.kv.transport import Export, PeerMemory, Transport

NUM_LAYERS = 32
PAGE_KIB = (8, 64, 512)
NUM_ALLOCATIONS = 10_000


class Offer(msgspec.Struct):
    """What the exporting process tells this one."""

    export: Export
    geometry: Geometry


def kv_geometry(total_bytes: int, page_bytes: int) -> Geometry:
    """Layers outermost, as vLLM lays them out on a CPU and by default on a GPU."""
    num_blocks = total_bytes // (page_bytes * NUM_LAYERS)
    region = Region(0, NUM_LAYERS, page_bytes * num_blocks, page_bytes, page_bytes, 0)
    return Geometry("LBHNC", "bf16", 16, num_blocks, total_bytes, "bench", 1, 0, (region,))


def fragmented(num_blocks: int, rng: random.Random) -> deque[int]:
    """The free list of an allocator that has served NUM_ALLOCATIONS requests, 0 to 90 % full."""
    free = deque(range(num_blocks))
    held: list[list[int]] = []
    largest = max(1, min(64, num_blocks // 8))
    for _ in range(NUM_ALLOCATIONS):
        want = rng.randint(1, largest)
        while held and len(free) < max(want, num_blocks // 10):
            index = rng.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            free.extend(reversed(held.pop()))
        held.append([free.popleft() for _ in range(min(want, len(free)))])
    rng.shuffle(held)
    for blocks in held:
        free.extend(reversed(blocks))
    return free


def make_transport(kind: str, device: torch.device, num_slots: int) -> Transport:
    """`kind` is a transport's name, for cuda-ipc with its strategy after a colon."""
    name, _, strategy = kind.partition(":")
    if name == "shm":
        return ShmTransport()
    if name == "host":
        return HostTransport(device, num_slots)
    return CudaIpcTransport(device, strategy=strategy)  # type: ignore[arg-type]


def serve_export(kind: str, device: torch.device, total_bytes: int, page_bytes: int) -> None:
    """The exporting process: fill a buffer, export it, wait for the end of standard input."""
    geometry = kv_geometry(total_bytes, page_bytes)
    transport = make_transport(kind, device, geometry.num_blocks)
    if isinstance(transport, ShmTransport):
        buffer = transport.allocate(total_bytes)
    else:
        buffer = torch.zeros(total_bytes, dtype=torch.int8, device=device)
    buffer.view(torch.int64).copy_(torch.arange(total_bytes // 8, device=device))
    offer = Offer(transport.export(buffer, geometry), geometry)
    sys.stdout.buffer.write(msgspec.json.encode(offer) + b"\n")
    sys.stdout.buffer.flush()
    sys.stdin.buffer.read()
    transport.close()


@contextmanager
def exporter(kind: str, device: torch.device, total_bytes: int, page: int) -> Iterator[Offer]:
    """Run the exporting process for one measurement."""
    command = [sys.executable, __file__, "--export", kind, "--device", str(device)]
    command += ["--bytes", str(total_bytes), "--page-bytes", str(page)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield msgspec.json.decode(process.stdout.readline(), type=Offer)
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


class Bench:
    """One transport and page size: buffers on both sides and the four ways to copy."""

    def __init__(
        self, transport: Transport, offer: Offer, device: torch.device, copy_bytes: int, seed: int
    ) -> None:
        self.rng = random.Random(seed)
        self.device = device
        self.transport = transport
        self.geometry = offer.geometry
        self.page = offer.geometry.regions[0].page_bytes
        self.peer: PeerMemory = transport.map(offer.export, offer.geometry)
        self.source = peer_bytes(self.peer)
        self.target = self._target(offer.geometry.total_bytes)
        num_blocks = offer.geometry.num_blocks
        self.per_copy = max(1, min(copy_bytes // (self.page * NUM_LAYERS), num_blocks // 4))
        self.copy_bytes = self.per_copy * self.page * NUM_LAYERS
        self.free = [fragmented(num_blocks, self.rng) for _ in range(2)]
        self.plan_s: list[float] = []

    def _target(self, total_bytes: int) -> torch.Tensor:
        if self.device.type == "cuda":
            return torch.zeros(total_bytes, dtype=torch.int8, device=self.device)
        self.buffer = ShmBuffer(total_bytes)
        self.buffer.populate_in_background().join()
        return self.buffer.as_tensor()

    def next_plan(self) -> CopyPlan:
        """Take blocks from the front of both free lists, put them back at the end."""
        lists = []
        for free in self.free:
            blocks = [free.popleft() for _ in range(self.per_copy)]
            free.extend(reversed(blocks))
            lists.append([blocks])
        started = time.perf_counter()
        plan = copy_plan(self.peer.geometry, self.geometry, lists[0], lists[1])
        _ = plan.sizes if self.device.type == "cuda" else plan.runs
        self.plan_s.append(time.perf_counter() - started)
        return plan

    def ours(self, plan: CopyPlan) -> None:
        self.transport.copy(self.peer, plan, self.target)

    def one(self, plan: CopyPlan) -> None:
        at = self.rng.randrange(0, self.target.numel() - self.copy_bytes, 4096)
        if self.device.type == "cuda":
            self.target[at : at + self.copy_bytes].copy_(
                self.source[at : at + self.copy_bytes], non_blocking=True
            )
            torch.cuda.synchronize(self.device)
        else:
            ctypes.memmove(
                self.target.data_ptr() + at, self.source.data_ptr() + at, self.copy_bytes
            )

    def pieces(self, plan: CopyPlan) -> None:
        count = self.copy_bytes // self.page
        first = self.rng.randrange(0, self.target.numel() // self.page - 2 * count + 1)
        window = slice(first * self.page, (first + 2 * count) * self.page)
        views = [t[window].view(count, 2 * self.page)[:, : self.page] for t in self._both()]
        if self.device.type == "cuda":
            words = [view.view(torch.int64) for view in views]
            words[1].copy_(words[0], non_blocking=True)
            torch.cuda.synchronize(self.device)
        else:
            # numpy's copy of contiguous rows is a C loop over memcpy.
            views[1].numpy()[...] = views[0].numpy()

    def loop(self, plan: CopyPlan) -> None:
        move, base_src, base_dst = ctypes.memmove, self.source.data_ptr(), self.target.data_ptr()
        for src, dst, size in zip(*(c.tolist() for c in plan.ranges), strict=True):
            move(base_dst + dst, base_src + src, size)

    def _both(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.source, self.target

    def check(self) -> None:
        """Copy once and compare every page, so that no number is of a wrong copy."""
        plan = self.next_plan()
        self.ours(plan)
        if isinstance(self.transport, HostTransport):
            return  # nothing is staged here: the pool holds zeros, and only the time counts
        for src, dst, size in zip(*(c.tolist() for c in plan.ranges), strict=True):
            here, there = self.target[dst : dst + size], self.source[src : src + size]
            assert torch.equal(here, there), "the transport copied wrong bytes"

    def close(self) -> None:
        self.source = torch.empty(0)
        self.transport.unmap(self.peer)
        self.transport.close()
        if self.device.type == "cpu":
            self.buffer.close()


def peer_bytes(peer: Any) -> torch.Tensor:
    """The mapped peer's bytes as a tensor, for the baselines."""
    if hasattr(peer, "tensor"):
        return peer.tensor  # type: ignore[no-any-return]
    if hasattr(peer, "pool"):
        return peer.pool.tensor  # type: ignore[no-any-return]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only memory: the baselines only read it
        return torch.from_numpy(np.frombuffer(peer.memory.mapping, np.int8))


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Run the ways in turns, each round in another order; medians and medians of ratios."""
    ways: dict[str, Callable[[CopyPlan], None]] = {
        "ours": bench.ours,
        "one": bench.one,
        "pieces": bench.pieces,
    }
    if bench.device.type == "cpu":
        ways["loop"] = bench.loop
    taken_s: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    num_ranges = 0
    for round_number in range(rounds + 1):
        bench.rng.shuffle(order)
        for name in order:
            plan = bench.next_plan()
            num_ranges = len(plan.sizes)
            started = time.perf_counter()
            ways[name](plan)
            if round_number:  # the first round warms up
                taken_s[name].append(time.perf_counter() - started)
    result: dict[str, Any] = {
        f"{name}_gb_s": round(bench.copy_bytes / statistics.median(times) / 1e9, 2)
        for name, times in taken_s.items()
    }
    for name in ways:
        if name != "ours":
            ratios = [a / b for a, b in zip(taken_s[name], taken_s["ours"], strict=True)]
            result[f"ours_over_{name}"] = round(statistics.median(ratios), 3)
    result["plan_us"] = round(statistics.median(bench.plan_s) * 1e6, 1)
    result |= {"num_ranges": num_ranges, "copy_mib": bench.copy_bytes / 2**20}
    return result


def run(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    gpu = device.type == "cuda"
    kinds = ["cuda-ipc:gather", "cuda-ipc:loop", "host"] if gpu else ["shm"]
    rows = []
    for kind in kinds:
        for page_kib in PAGE_KIB:
            page = page_kib * 1024
            with exporter(kind, device, args.bytes, page) as offer:
                slots = offer.geometry.num_blocks
                transport = make_transport(kind, device, slots)
                bench = Bench(transport, offer, device, args.copy_bytes, args.seed)
                if kind == "host":
                    assert bench.peer.geometry == staging_geometry(offer.geometry, slots)
                bench.check()
                row = {"transport": kind, "page_kib": page_kib, **measure(bench, args.rounds)}
                bench.close()
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--device", help="cpu or cuda:N; default: a GPU if there is one")
    parser.add_argument("--bytes", type=int, help="size of each KV buffer")
    parser.add_argument("--copy-bytes", type=int, default=128 << 20, help="bytes per copy")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export", help=argparse.SUPPRESS)
    parser.add_argument("--page-bytes", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    args.bytes = args.bytes or (4 << 30 if device.type == "cuda" else 1 << 30)
    torch.set_num_threads(1)
    if args.export:
        serve_export(args.export, device, args.bytes, args.page_bytes)
        return
    report = {
        "benchmark": "handoff_copy",
        "command": f"python benchmarks/handoff_copy.py --rounds {args.rounds} --seed {args.seed}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "num_layers": NUM_LAYERS,
        "num_allocations": NUM_ALLOCATIONS,
        "buffer_bytes": args.bytes,
        "seed": args.seed,
        "rounds": args.rounds,
        "rows": run(args, device),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
