"""The master's hold on an import process that says what it should not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinfer.config import ServeConfig
from tinfer.master import zygote_link
from tinfer.master.zygote_link import Lifeline, ZygoteLink
from tinfer.wire.control import MAX_FRAME_BYTES, Control, Imported, pack

# Writes what it is told to the control socket, and waits for its end.
SAYS = """
import socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
control.sendall(bytes.fromhex(sys.argv[2]))
control.recv(1)
"""


class Held:
    """A link to a process that has said `said`, and what came of it."""

    def __init__(self, said: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def command(_config: ServeConfig, _dir: Path, control: int, _lifeline: int) -> list[str]:
            return [sys.executable, "-c", SAYS, str(control), said.hex()]

        monkeypatch.setattr(zygote_link, "_command", command)
        self.messages: list[Control] = []
        self.num_exits = 0
        self.changed = asyncio.Event()
        self.lifeline = Lifeline()
        config = ServeConfig(model="m")
        self.link = ZygoteLink(config, folder, self.lifeline, self._heard, self._ended)

    def _heard(self, message: Control) -> None:
        self.messages.append(message)
        self.changed.set()

    def _ended(self) -> None:
        self.num_exits += 1
        self.changed.set()

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not done():
                self.changed.clear()
                await self.changed.wait()


Say = Callable[[bytes], Held]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Say]:
    held: list[Held] = []

    def said(data: bytes) -> Held:
        held.append(Held(data, tmp_path, monkeypatch))
        return held[-1]

    yield said
    for one in held:
        one.link.reap()
        one.lifeline.close()


async def test_a_broken_frame_takes_nothing_else_with_it(say: Say) -> None:
    broken = (3).to_bytes(4, "little") + b"\xc1\xc1\xc1"
    held = say(pack(Imported(1.0)) + broken + pack(Imported(2.0)))
    await held.until(lambda: len(held.messages) == 2)
    assert held.messages == [Imported(1.0), Imported(2.0)]
    assert held.num_exits == 0


async def test_a_stream_that_cannot_be_followed_is_given_up_once(say: Say) -> None:
    held = say(pack(Imported(1.0)) + (MAX_FRAME_BYTES + 1).to_bytes(4, "little") + bytes(40_000))
    await held.until(lambda: held.num_exits > 0)
    for _ in range(10):  # what is in the socket still would be read in a turn of the loop
        await asyncio.sleep(0)
    assert held.num_exits == 1
