"""What `tinfer serve` says on the terminal: its progress, and one block when it is ready."""

from __future__ import annotations

import sys
import time

import click

from tinfer import __version__
from tinfer.config import ServeConfig
from tinfer.master.front import Front
from tinfer.master.supervisor import Life, Supervisor, WorkerSlot
from tinfer.master.transport import Choice


class StartReport:
    """Lines on standard error; each says something once."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._said: set[str] = set()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            click.echo(f"[{self.elapsed_s:5.1f} s] {text}", err=True)

    def workers(self, supervisor: Supervisor) -> None:
        """How far the workers are; called after every change."""
        if supervisor.import_s is None:
            self.say("importing the engine (once, for all workers)")
            return
        self.say(f"engine imported in {supervisor.import_s:.1f} s; starting workers")
        for slot in supervisor.slots.values():
            who = f"worker {slot.placement.worker_id} ({slot.placement.label})"
            if slot.life is Life.READY and slot.ready is not None:
                built_s = slot.ready.start_s.get("engine", 0.0)
                self.say(f"{who} is ready; its engine took {built_s:.1f} s")


def ready_block(
    config: ServeConfig,
    supervisor: Supervisor,
    choice: Choice,
    front: Front,
    name: str,
    elapsed_s: float,
) -> str:
    """The one block a user reads: where, what, who, how."""
    slots = [slot for slot in supervisor.slots.values() if slot.ready is not None]
    first = slots[0].ready
    assert first is not None
    width = max(len(slot.placement.worker_id) for slot in slots)
    lines = [
        f"tinfer {__version__} serves {name} on {front.url}",
        *(_worker_line("workers" if i == 0 else "", s, width) for i, s in enumerate(slots)),
        f"  {'hand-off':<9} {_handoff(choice, len(slots))}",
        f"  {'chunk':<9} {first.chunk_tokens} tokens; route {config.route}; "
        f"up to {first.max_model_len} tokens per request",
        f"  {'started':<9} in {elapsed_s:.1f} s",
    ]
    lines += [f"  {'note':<9} {note}" for note in sorted(supervisor.notes)]
    if len(front.keys):
        lines.append(f"  {'keys':<9} {len(front.keys)}, of which clients must show one")
    if config.engine == "fake":
        lines.append(f"  {'note':<9} the fake engine answers with seeded nonsense")
    return "\n".join(lines)


def _handoff(choice: Choice, num_workers: int) -> str:
    if num_workers == 1:
        return "none (one worker does both phases)"
    return f"{choice.name} ({choice.reason})"


def _worker_line(head: str, slot: WorkerSlot, width: int) -> str:
    ready = slot.ready
    assert ready is not None
    return (
        f"  {head:<9} {slot.placement.worker_id:<{width}}  {slot.placement.label}  "
        f"pid {ready.pid}  {ready.num_blocks} KV blocks of {ready.block_tokens} tokens "
        f"({ready.kv_bytes / 2**20:.0f} MiB, {ready.dtype})"
    )


def show(block: str) -> None:
    """The ready block goes to standard output, so that a script can wait for it."""
    click.echo(block)
    sys.stdout.flush()
