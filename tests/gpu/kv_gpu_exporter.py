"""A prefill worker's side on a GPU, in its own process: one JSON order per line, one answer each.

Run as `python -m tests.gpu.kv_gpu_exporter TRANSPORT SEED`; the first line is the geometry.
"""

from __future__ import annotations

import sys
import time

import msgspec
import torch

from tests.unit.kv_box import random_bytes
from tinfer.worker.kv.geometry import Geometry
from tinfer.worker.kv.lease import LeaseRef, LeaseTable
from tinfer.worker.kv.probe import build_transport
from tinfer.worker.kv.puller import PeerInfo
from tinfer.worker.kv.source import SourceBlocks, block_source
from tinfer.worker.kv.transport import Transport

NUM_SLOTS = 64


class Hold(msgspec.Struct, tag="hold"):
    """Lease these blocks; the answer is (lease, where to read them)."""

    blocks: list[list[int]]


class Ended(msgspec.Struct, tag="ended"):
    """Answer with the leases that readers have ended since the last time."""


class Reuse(msgspec.Struct, tag="reuse"):
    """Close all leases, then overwrite the KV buffer."""


Order = Hold | Ended | Reuse


def main(name: str, seed: int) -> None:
    layout = msgspec.json.decode(sys.stdin.buffer.readline(), type=Geometry)
    buffer = torch.from_numpy(random_bytes(layout.total_bytes, seed)).cuda()
    transport = build_transport(name, num_staging_slots=NUM_SLOTS)
    table, source = LeaseTable.create(8), block_source(name, NUM_SLOTS)
    export = transport.export(buffer, layout)
    held: list[tuple[LeaseRef, SourceBlocks]] = []
    _answer(PeerInfo("p", 1, export, layout, table.descriptor()))
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        if isinstance(order, Hold):
            offered = source.prepare(order.blocks)
            lease = table.open_lease(time.monotonic() + 60, ready=not source.needs_staging)
            held.append((lease, offered))
            stage = source.order(lease, order.blocks, offered)
            if stage is not None:
                transport.stage(stage)
                _await_staged(transport, table)
            _answer(held[-1])
        elif isinstance(order, Ended):
            _answer(table.poll()[0])
        else:
            while held:
                lease, offered = held.pop()
                table.close_lease(lease)
                source.finish(offered)
            buffer.fill_(99)
            torch.cuda.synchronize()
            _answer(True)


def _await_staged(transport: Transport, table: LeaseTable) -> None:
    torch.cuda.synchronize()
    (lease,) = transport.staged()
    table.mark_ready(lease)


def _answer(value: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
