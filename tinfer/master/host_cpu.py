"""What this machine's CPU computes fast."""

from __future__ import annotations

from pathlib import Path

from tinfer.cgroup import PROC

# Prompts of the built-in model took 2.8 times as long as in float32, many answers at once 2.5
# times, one answer as long (vLLM 0.32, one thread of an AMD EPYC 7003, November 2026).
SLOW_HALVES = (
    "this CPU has no AVX-512, without which 16 bits are slow: --dtype float32 computes "
    "prompts 2 to 4 times as fast and takes twice the memory"
)


def halves_are_slow(proc: Path = PROC) -> bool:
    """Whether this is an x86 CPU without AVX-512; false where /proc does not tell."""
    try:
        lines = (proc / "cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), ["avx512f"])
    return "avx512f" not in flags
