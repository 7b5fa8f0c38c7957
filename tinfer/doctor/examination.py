"""All checks in the order of the report, run side by side where they do not disturb each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pynvml
from msgspec import Struct

from tinfer.doctor import engine, gpus, hub, leftovers, limits, machine, peers, ports, shared_memory
from tinfer.doctor.finding import Finding, fault
from tinfer.doctor.nvml import Inventory, read_inventory

# Enough for everything that waits for other processes; the rest takes milliseconds.
_NUM_THREADS = 6


class Check(Struct, frozen=True):
    """One or more lines of the report; `run` may take seconds, may not raise, changes nothing."""

    name: str
    run: Callable[[], Sequence[Finding]]


class Examination(Struct, frozen=True):
    """The whole report as `--json` writes it.

    `findings` in the order of the report, each {check, level, found, advice}; `num_warnings` and
    `num_faults` count them by level; `elapsed_s` is the time it all took.
    """

    version: str
    findings: list[Finding]
    num_warnings: int
    num_faults: int
    elapsed_s: float

    @classmethod
    def of(cls, version: str, findings: list[Finding], elapsed_s: float) -> Examination:
        num_warnings = sum(finding.level == "warning" for finding in findings)
        num_faults = sum(finding.level == "fault" for finding in findings)
        return cls(version, findings, num_warnings, num_faults, elapsed_s)


def examine(checks: Sequence[Check]) -> Iterator[Finding]:
    """Run all checks at once; yield the findings in order, each as soon as it is its turn."""
    with ThreadPoolExecutor(_NUM_THREADS, "doctor") as pool:
        running: list[Future[Sequence[Finding]]] = [pool.submit(_run, check) for check in checks]
        for future in running:
            yield from future.result()


def checks_of_this_box(fix: bool) -> list[Check]:
    """Every check, on the box at hand; with `fix` the leftovers are removed as well."""
    environ = dict(os.environ)
    inventory = read_inventory(pynvml, environ)
    num_gpus = len(inventory.gpus)
    has_gpu = num_gpus > 0
    # Alone, before anything else loads the cores: it measures.
    copied = shared_memory.probe()
    return [
        Check("machine", lambda: machine.check_this_machine(has_gpu)),
        Check("limits", lambda: limits.check_this_process(has_gpu)),
        Check("/dev/shm", lambda: [shared_memory.check_shm(_shm_room())]),
        Check("shared memory", lambda: [copied]),
        Check("GPUs", lambda: _gpu_findings(inventory)),
        Check("hub", lambda: hub.check_this_hub(environ)),
        Check("port", lambda: [ports.check_default_port()]),
        Check("leftovers", lambda: _leftovers(fix)),
        Check(engine.CHECK, lambda: [engine.check_engine(engine.import_engine(environ), num_gpus)]),
        Check(peers.CHECK, lambda: [peers.probe_peers(inventory.gpus, environ)]),
    ]


def _run(check: Check) -> Sequence[Finding]:
    try:
        return check.run()
    except Exception as error:  # noqa: BLE001  one broken check must not hide what the others found
        words = f"this check failed itself: {type(error).__name__}: {error}"
        return [fault(check.name, words, "report it with this line")]


def _shm_room() -> shared_memory.Room | None:
    return shared_memory.room_of(Path("/dev/shm"))


def _gpu_findings(inventory: Inventory) -> list[Finding]:
    return [
        gpus.check_driver(inventory, gpus.count_pci_gpus()),
        *gpus.check_gpus(inventory),
        *gpus.check_device_files(gpus.read_device_files()),
    ]


def _leftovers(fix: bool) -> list[Finding]:
    left = leftovers.look_twice()
    return leftovers.remove(left) if fix and left else leftovers.describe(left)
