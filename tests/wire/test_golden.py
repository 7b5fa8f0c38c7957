"""The bytes of every message type, as committed: a change of the wire has to be meant."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from msgspec import Struct

from tests.wire.samples import CONTROL, TO_MASTER, TO_WORKER, encoded
from tinfer.wire.control import Control, FrameReader
from tinfer.wire.messages import ToMaster, ToWorker, decode_to_master, decode_to_worker

SAMPLES: list[Struct] = [*TO_WORKER, *TO_MASTER, *CONTROL]
GOLDEN = [line.split() for line in (Path(__file__).parent / "golden.txt").read_text().splitlines()]
PAIRS = list(zip(SAMPLES, GOLDEN, strict=True))
NAMES = [f"{n}-{name}" for n, (name, _) in enumerate(GOLDEN)]


def test_every_type_of_every_channel_has_a_sample() -> None:
    for union, samples in ((ToWorker, TO_WORKER), (ToMaster, TO_MASTER), (Control, CONTROL)):
        assert {type(sample) for sample in samples} == set(typing.get_args(union))
    assert [name for name, _ in GOLDEN] == [type(sample).__name__ for sample in SAMPLES]


@pytest.mark.parametrize(("sample", "golden"), PAIRS, ids=NAMES)
def test_bytes_are_the_committed_ones(sample: Struct, golden: list[str]) -> None:
    assert encoded(sample).hex() == golden[1]


@pytest.mark.parametrize(("sample", "golden"), PAIRS, ids=NAMES)
def test_committed_bytes_are_read_as_the_sample(sample: Struct, golden: list[str]) -> None:
    data = bytes.fromhex(golden[1])
    if isinstance(sample, ToWorker):
        assert decode_to_worker(data) == sample
    elif isinstance(sample, ToMaster):
        assert decode_to_master(data) == sample
    else:
        assert FrameReader().feed(data) == [sample]
