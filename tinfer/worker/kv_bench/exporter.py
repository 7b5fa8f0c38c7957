"""The other process: fills a KV buffer, exports it, and waits for the end of standard input.

python -m tinfer.worker.kv_bench.exporter KIND LAYOUT DEVICE TOTAL_BYTES PAGE_BYTES
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import msgspec
import torch

from tinfer.errors import StartError
from tinfer.worker.kv.cuda_ipc import CudaIpcTransport
from tinfer.worker.kv.device_copy import Strategy
from tinfer.worker.kv.geometry import Geometry
from tinfer.worker.kv.host_transport import HostTransport
from tinfer.worker.kv.shm_transport import ShmTransport
from tinfer.worker.kv.transport import Export, Transport
from tinfer.worker.kv_bench.cache import kv_geometry
from tinfer.worker.kv_bench.options import Kind, Layout

_END_S = 60.0


class Offer(msgspec.Struct):
    """What the exporting process tells this one."""

    export: Export
    geometry: Geometry


def make_transport(kind: Kind, device: torch.device, num_slots: int) -> Transport:
    """One side's transport; `num_slots` are the staging slots of `host`."""
    name, _, strategy = kind.partition(":")
    if name == "shm":
        return ShmTransport()
    if name == "host":
        return HostTransport(device, num_slots)
    return CudaIpcTransport(device, strategy=cast(Strategy, strategy))


@contextmanager
def exporter(
    kind: Kind, layout: Layout, device: torch.device, total_bytes: int, page_bytes: int
) -> Iterator[Offer]:
    """Run the exporting process. Raises `StartError` where it does not get to its offer."""
    command = [sys.executable, "-m", "tinfer.worker.kv_bench.exporter"]
    command += [kind, layout, str(device), str(total_bytes), str(page_bytes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise StartError(f"{kind}: the exporting process ended with code {process.wait()}")
        yield msgspec.json.decode(line, type=Offer)
    finally:
        process.stdin.close()
        process.wait(_END_S)
        process.stdout.close()


def main(kind: str, layout: str, device_name: str, total: str, page: str) -> None:
    """Export a buffer whose every eight bytes are their own position."""
    device, total_bytes = torch.device(device_name), int(total)
    geometry = kv_geometry(cast(Layout, layout), total_bytes, int(page))
    transport = make_transport(cast(Kind, kind), device, geometry.num_blocks)
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
