"""What this process may use: descriptors, locked memory, CPU time and cores, memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Collection

from tinfer.cgroup import cpu_quota
from tinfer.doctor.finding import Finding, fault, ok, size, warning
from tinfer.master.host_memory import HostMemory, host_memory
from tinfer.master.limits import MIN_CLIENTS, RESERVED_DESCRIPTORS, RESERVED_PER_WORKER

# What `tinfer serve` starts without options.
NUM_WORKERS = 2
# Below this, one load test of a thousand streams is cut off.
FEW_CLIENTS = 1024
# Source: measured on two AMD EPYC cores, November 2026: master, import process and two workers of
# the built-in model held 1.3 GiB (sum of PSS) once ready, of their 256 MiB of KV each what was
# mapped so far.
NEED_MEMORY_BYTES = 1536 << 20
COMFORTABLE_MEMORY_BYTES = 3 << 30


def check_descriptors(soft: int, hard: int) -> Finding:
    """Open files; `tinfer serve` raises the soft limit to the hard one by itself."""
    words = f"{_limit(soft)} now, up to {_limit(hard)}"
    if hard == resource.RLIM_INFINITY:
        return ok("open files", words)
    advice = (
        "raise the hard limit: LimitNOFILE= of the service, limits.conf, docker --ulimit nofile"
    )
    num_clients = hard - RESERVED_DESCRIPTORS - RESERVED_PER_WORKER * NUM_WORKERS
    if num_clients < MIN_CLIENTS:
        return fault("open files", f"{words}: too few to serve", advice)
    words += f": about {num_clients} clients at a time"
    if num_clients < FEW_CLIENTS:
        return warning("open files", words, advice)
    return ok("open files", words)


def check_locked_memory(soft: int, has_gpu: bool) -> Finding:
    """Locked memory. The hand-off over host memory pins its staging buffer through the NVIDIA
    driver, which most systems do not count here, so a small limit alone is no fault."""
    words = "unlimited" if soft == resource.RLIM_INFINITY else size(soft)
    if not has_gpu:
        return ok("locked memory", f"{words}; not needed without a GPU")
    if soft != resource.RLIM_INFINITY:
        words += "; if a worker says that it cannot pin memory: ulimit -l unlimited"
    return ok("locked memory", words)


def check_cpus(allowed: Collection[int], num_cores: int, quota: float | None) -> Finding:
    """Cores by affinity (which a cpuset narrows too) and by the cgroup's time quota, in cores."""
    words = f"{len(allowed)} of {num_cores} cores"
    if quota is None:
        words += ", no time quota"
    else:
        words += f", a cgroup's time quota of {quota:g} cores"
    if min(len(allowed), quota or len(allowed)) < 2:
        return warning(
            "CPU",
            words,
            "one prefill and one decode worker on CPU want a core each: allow more, or raise the "
            "quota (docker --cpus, --cpuset-cpus)",
        )
    return ok("CPU", words)


def check_memory(memory: HostMemory) -> Finding:
    """Main memory, as far as this process may take it."""
    words = f"{size(memory.free_bytes)} of {size(memory.total_bytes)} free ({memory.limited_by})"
    advice = "free memory, raise the container's limit, or lower --kv-cache-memory-bytes"
    if memory.free_bytes < NEED_MEMORY_BYTES:
        return fault("memory", words, f"too little for two CPU workers: {advice}")
    if memory.free_bytes < COMFORTABLE_MEMORY_BYTES:
        return warning("memory", words, f"tight for two CPU workers: {advice}")
    return ok("memory", words)


def check_this_process(has_gpu: bool) -> list[Finding]:
    """All checks of this module on the process at hand."""
    return [
        check_cpus(os.sched_getaffinity(0), os.cpu_count() or 1, cpu_quota()),
        check_memory(host_memory()),
        check_descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_gpu),
    ]


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)
