"""The other process of the shared memory probe; run as a script, standard library only.

`memory_reader.py PID FD SIZE` opens the owner's memfd as a worker opens its peer's KV memory,
copies it and writes one JSON object: `error`, or `digest` of what arrived and `gb_per_s`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import statistics
import sys
import time

NUM_COPIES = 5


def read(pid: int, fd: int, num_bytes: int) -> dict[str, str | float]:
    """Copy the memory behind /proc/PID/fd/FD; `gb_per_s` is the median copy.

    The first copy maps every page of both sides and is not timed: a worker's KV memory is mapped
    before it serves.
    """
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        source = memoryview(mmap.mmap(opened, num_bytes, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        return {"error": str(error)}
    target = memoryview(mmap.mmap(-1, num_bytes))
    target[:] = source
    times_s = []
    for _ in range(NUM_COPIES):
        started_s = time.perf_counter()
        target[:] = source
        times_s.append(time.perf_counter() - started_s)
    digest = hashlib.sha256(target).hexdigest()
    return {"digest": digest, "gb_per_s": num_bytes / statistics.median(times_s) / 1e9}


if __name__ == "__main__":
    pid, fd, num_bytes = map(int, sys.argv[1:])
    sys.stdout.write(json.dumps(read(pid, fd, num_bytes)))
