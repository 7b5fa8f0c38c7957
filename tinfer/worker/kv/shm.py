"""Anonymous shared memory between workers: a memfd, opened by peers through `/proc/PID/fd/FD`.

There is no name to collide or to clean up: the memory goes with the last process that maps it.
This module owns the invariant that a descriptor opens exactly the memory it was made for; a reused
process id, descriptor number or a file of another size is `PeerGone`, not somebody else's bytes.
"""

import contextlib
import mmap
import os
from pathlib import Path

import msgspec

from tinfer.worker.kv.errors import KVMemoryError, PeerGone

MEMFD_PREFIX = "tinfer-"


class ShmDescriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a peer finds a memfd: plain data, valid while the owning process holds the file open.

    `start_time_ticks` (field 22 of `/proc/PID/stat`) and `inode` tell a reused pid or descriptor
    number from the original.
    """

    pid: int
    fd: int
    size_bytes: int
    start_time_ticks: int
    inode: int


def process_start_ticks(pid: int) -> int | None:
    """Return the start time of a live process in clock ticks since boot, None if it has ended.

    A zombie has ended: its memory and descriptors are gone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and brackets, so fields are counted after the last bracket.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def process_alive(pid: int, start_time_ticks: int) -> bool:
    """Tell whether the very process that started at `start_time_ticks` still runs."""
    return process_start_ticks(pid) == start_time_ticks


def create_memfd(name: str, size_bytes: int) -> tuple[int, mmap.mmap]:
    """Create a memfd of `size_bytes`, all of it reserved and zero, and map it shared.

    The caller owns the descriptor (close-on-exec) and the mapping.

    Raises:
        ValueError: `size_bytes` is not positive.
        KVMemoryError: the kernel refused; nothing stays open.
    """
    if size_bytes <= 0:
        raise ValueError(f"size_bytes must be positive, got {size_bytes}")
    fd = os.memfd_create(MEMFD_PREFIX + name)
    try:
        # A sparse file on a full machine is a SIGBUS at the first touch; this fails here instead.
        os.posix_fallocate(fd, 0, size_bytes)
        return fd, mmap.mmap(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        raise KVMemoryError(f"cannot reserve {size_bytes} bytes: {error.strerror}") from error


def describe(fd: int) -> ShmDescriptor:
    """Describe an open memfd of the calling process."""
    stat = os.fstat(fd)
    ticks = process_start_ticks(os.getpid())
    assert ticks is not None, "the calling process runs"
    return ShmDescriptor(
        pid=os.getpid(),
        fd=fd,
        size_bytes=stat.st_size,
        start_time_ticks=ticks,
        inode=stat.st_ino,
    )


def attach_mmap(descriptor: ShmDescriptor, *, writable: bool = False) -> mmap.mmap:
    """Map the memory behind a peer's descriptor; the mapping outlives the peer.

    Needs the same user as the owner. The caller owns the mapping.

    Raises:
        PeerGone: the process has ended, or the file is not the one described.
    """
    path = f"/proc/{descriptor.pid}/fd/{descriptor.fd}"
    try:
        target = os.readlink(path)
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise PeerGone(f"cannot open {path}: {error.strerror}") from error
    try:
        if not target.startswith(f"/memfd:{MEMFD_PREFIX}"):
            raise PeerGone(f"{path} is {target}, not shared KV memory")
        stat = os.fstat(fd)
        if (stat.st_size, stat.st_ino) != (descriptor.size_bytes, descriptor.inode):
            raise PeerGone(f"{path} is not the memory that was described")
        # Checked after the open: a live process with this start time owned the file opened above.
        if not process_alive(descriptor.pid, descriptor.start_time_ticks):
            raise PeerGone(f"process {descriptor.pid} has ended or its id was reused")
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        return mmap.mmap(fd, descriptor.size_bytes, access=access)
    finally:
        os.close(fd)


def close_mmap(mapping: mmap.mmap) -> None:
    """Unmap now, or, where views of the mapping are still alive, when the last of them goes."""
    with contextlib.suppress(BufferError):
        mapping.close()
