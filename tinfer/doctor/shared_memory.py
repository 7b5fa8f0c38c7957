"""Memory that two processes share: the /dev/shm of a tensor-parallel engine, and the memfd through
/proc/PID/fd that moves KV blocks between CPU workers, tried with two real processes."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from tinfer.doctor.finding import Finding, fault, ok, size, warning

# Source: vLLM 0.32 reserves a ring of ten times 16 MiB (VLLM_MQ_MAX_CHUNK_BYTES_MB) for the ranks
# of each tensor-parallel worker, and refuses to start where that is not free; 1 GiB holds those of
# a prefill and a decode worker, with what NCCL takes beside them.
ROOMY_SHM_BYTES = 1 << 30
PROBE_BYTES = 64 << 20
PROBE_TIMEOUT_S = 30.0
_READER = Path(__file__).with_name("memory_reader.py")
_ADVICE_PROC = (
    "CPU workers open each other's memory through /proc as the same user: mount /proc without "
    "hidepid, and allow it in the container's security profile"
)


class Room(Struct, frozen=True):
    """A file system's size and what is free of it."""

    total_bytes: int
    free_bytes: int


class Copied(Struct, frozen=True):
    """What a second process saw of this one's memory; `error` says why it saw nothing."""

    error: str = ""
    digest: str = ""
    gb_per_s: float = 0.0


def room_of(path: Path) -> Room | None:
    """The room of the file system at `path`; None where there is no such path."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return Room(stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)


def check_shm(room: Room | None) -> Finding:
    """The size of /dev/shm, which KV blocks never use."""
    needs = "only --tensor-parallel-size above 1 needs it"
    advice = f"{needs}: docker run --shm-size 2g (or --ipc=host), or mount -o remount,size=2g"
    if room is None:
        return warning("/dev/shm", "missing", f"{needs}: mount a tmpfs there")
    words = f"{size(room.free_bytes)} of {size(room.total_bytes)} free"
    if room.free_bytes >= ROOMY_SHM_BYTES:
        return ok("/dev/shm", words)
    if room.total_bytes == 64 << 20:
        words += ", a container's default"
    return warning("/dev/shm", words, advice)


def check_memory_between_processes(copied: Copied, digest: str, hardening: str) -> Finding:
    """Whether CPU workers can read each other's KV memory; `digest` is of what was offered."""
    check = "shared memory"
    words = f" ({hardening})" if hardening else ""
    if copied.error:
        return fault(check, f"cannot be opened: {copied.error}{words}", _ADVICE_PROC)
    if copied.digest != digest:
        return fault(
            check,
            "the bytes that arrived are not those that were written",
            "test the machine's memory; report it if it is sound",
        )
    return ok(check, f"read from another process, {copied.gb_per_s:.1f} GB/s")


def describe_hardening(proc: Path = Path("/proc")) -> str:
    """Settings that keep processes apart: hidepid of /proc, and Yama's ptrace_scope."""
    found = []
    with contextlib.suppress(OSError):
        for line in (proc / "self/mounts").read_text().splitlines():
            _, folder, kind, options, *_ = line.split()
            if (folder, kind) == ("/proc", "proc"):
                found += [word for word in options.split(",") if word.startswith("hidepid=")]
    with contextlib.suppress(OSError):
        scope = (proc / "sys/kernel/yama/ptrace_scope").read_text().strip()
        if scope != "0":
            found.append(f"ptrace_scope={scope}")
    return ", ".join(found)


def read_elsewhere(fd: int, num_bytes: int) -> Copied:
    """Have another process read so many bytes behind a descriptor of this one."""
    command = [sys.executable, "-P", str(_READER), str(os.getpid()), str(fd), str(num_bytes)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Copied(error=f"the other process took more than {PROBE_TIMEOUT_S:g} s")
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Copied(error="".join(last) or f"the other process ended with {done.returncode}")
    return msgspec.json.decode(done.stdout, type=Copied)


def probe(
    num_bytes: int = PROBE_BYTES, read: Callable[[int, int], Copied] = read_elsewhere
) -> Finding:
    """Offer random bytes in a memfd, have another process copy them, compare."""
    seed = os.urandom(1 << 20)
    digest = hashlib.sha256(seed * (num_bytes >> 20)).hexdigest()
    fd = os.memfd_create("doctor-probe", os.MFD_CLOEXEC)
    try:
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError as error:
            words = f"cannot reserve {size(num_bytes)}: {error.strerror}"
            return fault("shared memory", words, "free memory, or raise the container's limit")
        with mmap.mmap(fd, num_bytes) as memory:
            for start in range(0, num_bytes, len(seed)):
                memory[start : start + len(seed)] = seed
        copied = read(fd, num_bytes)
    finally:
        os.close(fd)
    return check_memory_between_processes(copied, digest, describe_hardening())
