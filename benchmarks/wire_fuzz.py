"""A million broken frames for every decoder that reads what another process wrote.

The decoders are those of `tests/wire/channels.py`: messages of both directions, the control stream,
identities, what workers publish for each other, and HTTP bodies; the cases those of
`tests/wire/mutations.py`. Each decoder runs in a process of its own with little room to grow: an
error that is not a rejection, memory that a frame merely promises, a crash and a hang are all
findings, each with the number of the case that made it. Afterwards the same frames go through real
sockets: the master's link and a worker's loop with the fake engine, which must answer at the end.

    python -m benchmarks.wire_fuzz --cases 1000000 --json wire_fuzz.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.wire.channels import BINARY, BODIES, IDENTITIES, STREAM, Channel
from tests.wire.mutations import BYTE_MUTATIONS, MUTATIONS, Mutation, broken

ROOT = Path(__file__).resolve().parents[1]
CHANNELS: dict[str, tuple[Channel, tuple[Mutation, ...]]] = {
    **{channel.name: (channel, MUTATIONS) for channel in BINARY},
    **{channel.name: (channel, BYTE_MUTATIONS) for channel in (STREAM, IDENTITIES, *BODIES)},
}
# What a decoder's process may take beyond what it has when it starts.
ROOM_BYTES = 256 << 20
# A case takes some 30 us; a decoder that is this late has hung.
HANG_S = 10.0
MOST_FINDINGS = 20


def fuzz(name: str, num_cases: int, seed: int) -> dict[str, Any]:
    """Every case of one decoder, in this process. Each is made from its own seed."""
    logging.disable(logging.CRITICAL)
    channel, mutations = CHANNELS[name]
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + ROOM_BYTES,) * 2)
    before_bytes = peak_bytes()
    counts: Counter[str] = Counter()
    by_mutation: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    slowest_s = 0.0
    for number in range(num_cases):
        mutation, data = broken(random.Random(f"{seed}/{name}/{number}"), channel.frames, mutations)
        by_mutation[mutation] += 1
        began_s = time.perf_counter()
        try:
            counts["accepted" if channel.read(data) else "rejected"] += 1
        except channel.rejections:
            counts["rejected"] += 1
        except Exception as error:  # noqa: BLE001  whatever else comes is what is looked for
            counts["errors"] += 1
            if len(findings) < MOST_FINDINGS:
                what = f"{type(error).__name__}: {str(error)[:200]}"
                findings.append({"number": number, "mutation": mutation, "error": what})
        taken_s = time.perf_counter() - began_s
        slowest_s = max(slowest_s, taken_s)
        if taken_s > HANG_S:
            findings.append({"number": number, "mutation": mutation, "error": f"{taken_s} s"})
    return {
        "cases": num_cases,
        **{kind: counts[kind] for kind in ("accepted", "rejected", "errors")},
        "by_mutation": dict(sorted(by_mutation.items())),
        "slowest_ms": round(1e3 * slowest_s, 2),
        "grown_bytes": peak_bytes() - before_bytes,
        "findings": findings,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(name: str, num_cases: int, seed: int) -> dict[str, Any]:
    """The same in a process of its own, so that a crash is a finding."""
    command = [sys.executable, "-m", "benchmarks.wire_fuzz", "--only", name]
    command += ["--cases", str(num_cases), "--seed", str(seed)]
    deadline_s = 60 + num_cases * 0.005
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"cases": num_cases, "findings": [{"error": f"no end within {deadline_s} s"}]}
    if done.returncode:
        crash = {"error": f"exit status {done.returncode}", "says": done.stderr[-2000:]}
        return {"cases": num_cases, "crashes": 1, "findings": [crash]}
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "crashes": 0}


def receivers() -> dict[str, Any]:
    """The tests of those who read from the sockets, which use the same frames."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/wire/test_receivers.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "says": done.stdout.strip().splitlines()[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000, help="over all decoders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(CHANNELS), help="one decoder, in this process")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(fuzz(arguments.only, arguments.cases, arguments.seed)))
        return
    share = -(-arguments.cases // len(CHANNELS))
    began_s = time.monotonic()
    channels = {}
    for name in CHANNELS:
        channels[name] = in_process(name, share, arguments.seed)
        print(name, {key: value for key, value in channels[name].items() if key != "by_mutation"})
    totals = {
        key: sum(one.get(key, 0) for one in channels.values())
        for key in ("cases", "accepted", "rejected", "errors", "crashes")
    }
    report = {
        "benchmark": "wire_fuzz",
        "command": f"python -m benchmarks.wire_fuzz --cases {arguments.cases} "
        f"--seed {arguments.seed}",
        "seed": arguments.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("msgspec", "pyzmq")},
        },
        "cores": os.cpu_count(),
        "room_bytes": ROOM_BYTES,
        "wall_s": round(time.monotonic() - began_s, 1),
        **totals,
        "num_findings": sum(len(one["findings"]) for one in channels.values()),
        "receivers": receivers(),
        "channels": channels,
    }
    print(totals, report["receivers"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if report["num_findings"] or report["receivers"]["exit_code"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
