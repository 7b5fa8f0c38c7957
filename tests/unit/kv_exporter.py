"""The process behind `kv_box.ExporterProcess`: one JSON order per line, one JSON answer each.

Imports no torch, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import sys
import time

import msgspec
import numpy as np

from tinfer.worker.kv.geometry import Geometry
from tinfer.worker.kv.lease import LeaseRef, LeaseTable
from tinfer.worker.kv.shm import create_memfd, describe


def main(seed: int) -> None:
    layout = msgspec.json.decode(sys.stdin.buffer.readline(), type=Geometry)
    fd, mapping = create_memfd("kv", layout.total_bytes)
    memory = np.frombuffer(mapping, np.int8)
    original = np.random.default_rng(seed).integers(-128, 128, len(memory), dtype=np.int8)
    memory[:] = original
    table = LeaseTable.create(8)
    held: list[LeaseRef] = []
    _answer(describe(fd))
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=str)
        if order == "leases":
            _answer(table.descriptor())
        elif order.startswith("open"):
            num_readers = int(order.removeprefix("open") or 1)
            held.append(table.open_lease(time.monotonic() + 60, num_readers))
            _answer(held[-1])
        elif order == "ended":
            ended, _ = table.poll()
            _answer(ended)
        elif order in ("reuse", "reset"):
            while held:
                table.close_lease(held.pop())
            memory[:] = 99 if order == "reuse" else original
            _answer(True)


def _answer(value: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
