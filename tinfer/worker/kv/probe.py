"""Which transport works on this machine, found out by trying it.

Whether one process may read another's GPU memory depends on the driver, the container, the IOMMU
and the topology; no flag says so reliably. So two fresh processes do it once: one exports a buffer
per device, the other opens them, copies, and reports a digest of what arrived. The caller itself
never touches CUDA, and may fork afterwards.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch

from tinfer.worker.kv.cuda_ipc import CudaIpcTransport
from tinfer.worker.kv.errors import KVError, TransportUnavailable
from tinfer.worker.kv.geometry import Geometry, Region, copy_plan
from tinfer.worker.kv.host_transport import HostTransport
from tinfer.worker.kv.shm_transport import ShmTransport
from tinfer.worker.kv.source import DEFAULT_STAGING_SLOTS
from tinfer.worker.kv.transport import BatchCopy, Export, Transport, TransportName

PROBE_TIMEOUT_S = 120.0  # two interpreters that import torch, and a CUDA context per device
_CHECKED_BYTES = 1 << 20
_TIMED_BYTES = 64 << 20
_TIMED_COPIES = 5


class ProbeResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the process on the second device read the first device's memory rightly."""

    ok: bool
    reason: str
    gb_per_s: float


class _Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The owner's half of one probe, handed to the reader's process."""

    owner: int
    reader: int
    export: Export


class _Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the reader saw."""

    digest: str
    reason: str
    gb_per_s: float


Probe = Callable[[Sequence[tuple[int, int]]], list[ProbeResult]]


def probe_cuda_ipc(device_a: int, device_b: int) -> ProbeResult:
    """Try whether a process on `device_b` can copy from a process on `device_a` (ordinals)."""
    return probe_pairs([(device_a, device_b)])[0]


def probe_pairs(pairs: Sequence[tuple[int, int]]) -> list[ProbeResult]:
    """Try (owner, reader) pairs of device ordinals, all in one pair of processes."""
    answer = _run_child(["owner"], msgspec.json.encode(list(pairs)))
    if isinstance(answer, str):
        return [ProbeResult(False, answer, 0.0) for _ in pairs]
    return msgspec.json.decode(answer, type=list[ProbeResult])


def choose_transport(
    requested: TransportName | str,
    device_type: str,
    devices: Sequence[int],
    probe: Probe = probe_pairs,
    environ: Mapping[str, str] = os.environ,
) -> tuple[TransportName, str]:
    """Return the transport to use and why; `requested` is `auto` or a transport's name.

    `devices` are the ordinals of the workers' devices; every ordered pair of them is tried.

    Raises:
        TransportUnavailable: the one asked for does not work here; the message says why.
    """
    if requested not in ("auto", "shm", "cuda-ipc", "host"):
        raise TransportUnavailable(f"there is no transport {requested!r}")
    if device_type == "cpu":
        if requested in ("auto", "shm"):
            return "shm", "workers on CPU share memory"
        raise TransportUnavailable(f"{requested} moves GPU memory, and the workers are on CPU")
    if requested == "shm":
        raise TransportUnavailable("shm moves CPU memory, and the workers are on GPUs")
    if requested == "host":
        return "host", "asked for"
    obstacle = _ipc_obstacle(devices, probe, environ)
    if obstacle is None:
        return "cuda-ipc", "probed: every GPU reads every other's memory"
    if requested == "cuda-ipc":
        raise TransportUnavailable(f"cuda-ipc does not work here: {obstacle}")
    return "host", f"cuda-ipc does not work here: {obstacle}"


def build_transport(
    name: TransportName | str,
    device: torch.device | None = None,
    *,
    batch_copy: BatchCopy | None = None,
    num_staging_slots: int = DEFAULT_STAGING_SLOTS,
) -> Transport:
    """Return a transport by name, for `device` or the current GPU.

    Raises:
        TransportUnavailable: there is no such transport, or no driver for it.
    """
    if name == "shm":
        return ShmTransport()
    if device is None:
        if not torch.cuda.is_available():
            raise TransportUnavailable(f"{name} needs a GPU, and torch sees none")
        device = torch.device("cuda", torch.cuda.current_device())
    if name == "cuda-ipc":
        return CudaIpcTransport(device, batch_copy)
    if name == "host":
        return HostTransport(device, num_staging_slots)
    raise TransportUnavailable(f"there is no transport {name!r}")


def _ipc_obstacle(devices: Sequence[int], probe: Probe, environ: Mapping[str, str]) -> str | None:
    """Return what keeps CUDA IPC from working between the devices, None if nothing does."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").replace(" ", "").lower():
            return f"{name} has expandable_segments:True, whose memory has no IPC handle"
    distinct = sorted(set(devices))
    pairs = [(a, b) for a in distinct for b in distinct if a != b]
    pairs = pairs or [(device, device) for device in distinct]
    for (owner, reader), result in zip(pairs, probe(pairs), strict=True):
        if not result.ok:
            return f"GPU {reader} cannot read GPU {owner}: {result.reason}"
    return None


def _run_child(args: Sequence[str], stdin: bytes) -> bytes | str:
    """Run this module in a fresh process; return its output, or why there is none."""
    command = [sys.executable, "-m", "tinfer.worker.kv.probe", *args]
    try:
        done = subprocess.run(  # noqa: S603  (our own interpreter and module)
            command, input=stdin, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the probe took more than {PROBE_TIMEOUT_S:.0f} s"
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return f"the probe ended with {done.returncode}: {lines[-1] if lines else 'no message'}"
    return done.stdout


def _geometry(num_bytes: int) -> Geometry:
    region = Region(0, 1, num_bytes, num_bytes, num_bytes, 0)
    return Geometry("probe", "int8", 1, 1, num_bytes, "", 1, 0, (region,))


def _own(pairs: Sequence[tuple[int, int]]) -> list[ProbeResult]:
    """The owner's process: export a buffer per device, have the reader's process copy it."""
    if not torch.cuda.is_available():
        return [ProbeResult(False, "torch sees no GPU", 0.0) for _ in pairs]
    buffers: dict[int, torch.Tensor] = {}
    transports: list[CudaIpcTransport] = []
    offers, expected, results = [], [], []
    try:
        for owner, reader in pairs:
            device = torch.device("cuda", owner)
            if owner not in buffers:
                generator = torch.Generator(device).manual_seed(owner + 1)
                buffers[owner] = torch.randint(
                    -128, 127, (_TIMED_BYTES,), dtype=torch.int8, device=device, generator=generator
                )
                torch.cuda.synchronize(device)
            transport = CudaIpcTransport(device)
            transports.append(transport)
            export = transport.export(buffers[owner], _geometry(_TIMED_BYTES))
            offers.append(_Offer(owner, reader, export))
            expected.append(_digest(buffers[owner]))
    except (KVError, RuntimeError) as error:
        return [ProbeResult(False, str(error), 0.0) for _ in pairs]
    answer = _run_child(["reader"], msgspec.json.encode(offers))
    if isinstance(answer, str):
        return [ProbeResult(False, answer, 0.0) for _ in pairs]
    for want, seen in zip(expected, msgspec.json.decode(answer, type=list[_Seen]), strict=True):
        reason = seen.reason
        if not reason and seen.digest != want:
            reason = "the bytes that arrived are not those that were sent"
        results.append(ProbeResult(not reason, reason, seen.gb_per_s))
    return results


def _read(offer: _Offer) -> _Seen:
    """The reader's process: open one export and copy it."""
    device = torch.device("cuda", offer.reader)
    geometry = _geometry(_TIMED_BYTES)
    plan = copy_plan(geometry, geometry, [[0]], [[0]])
    try:
        transport = CudaIpcTransport(device)
        target = torch.zeros(_TIMED_BYTES, dtype=torch.int8, device=device)
        torch.cuda.synchronize(device)
        peer = transport.map(offer.export, geometry)
        transport.copy(peer, plan, target)
        digest = _digest(target)
        started_s = time.perf_counter()
        for _ in range(_TIMED_COPIES):
            transport.copy(peer, plan, target)
        elapsed_s = time.perf_counter() - started_s
        transport.unmap(peer)
    except (KVError, RuntimeError) as error:
        return _Seen("", str(error), 0.0)
    return _Seen(digest, "", _TIMED_COPIES * _TIMED_BYTES / elapsed_s / 1e9)


def _digest(buffer: torch.Tensor) -> str:
    return hashlib.sha256(buffer[:_CHECKED_BYTES].cpu().numpy().tobytes()).hexdigest()


def _choose(requested: str, num_devices: int) -> dict[str, str]:
    try:
        name, reason = choose_transport(requested, "cuda", range(num_devices))
    except TransportUnavailable as error:
        return {"error": str(error)}
    return {"name": name, "reason": reason}


def _main(half: str, *arguments: str) -> None:
    """`choose REQUESTED NUM_GPUS` is for the master; the halves are this module's own children."""
    if half == "choose":
        requested, num_devices = arguments
        sys.stdout.buffer.write(msgspec.json.encode(_choose(requested, int(num_devices))))
        return
    stdin = sys.stdin.buffer.read()
    if half == "owner":
        answer = msgspec.json.encode(_own(msgspec.json.decode(stdin, type=list[tuple[int, int]])))
    else:
        offers = msgspec.json.decode(stdin, type=list[_Offer])
        answer = msgspec.json.encode([_read(offer) for offer in offers])
    sys.stdout.buffer.write(answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
