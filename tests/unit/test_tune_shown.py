"""A tuning as tables and pictures."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.unit.tune_box import ROOM, point, tuning
from tinfer.tune.plots import by_kv_length, draw_all
from tinfer.tune.table import lines_of, warnings_of
from tinfer.tune.tuning import Tuning

PNG = b"\x89PNG\r\n\x1a\n"


def noisy(made: Tuning) -> Tuning:
    steps = [
        msgspec.structs.replace(p, samples_s=(p.step_s, 1.5 * p.step_s, 2 * p.step_s))
        for p in made.steps
    ]
    return msgspec.structs.replace(made, steps=tuple(steps))


def test_every_point_has_a_row_and_every_result_a_line() -> None:
    lines = list(lines_of(tuning()))
    text = "\n".join(lines)
    assert lines[0] == "some/model on Some CPU @ 3 GHz, 1 thread, bfloat16"
    num_sections = sum(line.split()[-2:] == ["samples", "apart"] for line in lines)
    assert num_sections == 4 and "hand-off by shm, order to report" in lines
    rows = [line for line in lines if line.endswith("%") and not line.startswith("errors")]
    assert len(rows) == len(tuning().steps)
    assert "step      6.000 ms + 300.00 us per prompt token + 150.000 ns per token" in text
    assert "+ 400.00 us per sequence + 100.000 ns per KV token" in text
    assert "hand-off  2.000 ms + 1.000 us per prompt token" in text
    assert f"KV cache  {ROOM.num_tokens:,} tokens in 511 blocks of 128" in text
    assert f"chunk     {tuning().chunk.chunk_tokens} tokens" in text
    assert max(map(len, lines)) <= 100


def test_later_chunks_say_what_stands_before_them() -> None:
    lines = [line.split() for line in lines_of(tuning())]
    start = lines.index("later chunks of a prompt".split())
    assert [row[:2] for row in lines[start + 2 : start + 5]] == [
        ["256", "256"],
        ["256", "1024"],
        ["256", "4096"],
    ]


def test_one_worker_has_no_hand_off() -> None:
    text = "\n".join(lines_of(tuning(handoffs=False)))
    assert "hand-off  not measured: there is one worker" in text and "order to" not in text


def test_doubts_are_said() -> None:
    assert list(warnings_of(tuning())) == []
    (noise,) = warnings_of(noisy(tuning()))
    assert noise == "samples lie 33% apart: this box did other things as well"
    (crowd,) = warnings_of(msgspec.structs.replace(noisy(tuning()), waited_share=0.4))
    assert "waited for its core for 40% of its time" in crowd
    growing = msgspec.structs.replace(tuning().chunk, is_saturated=False)
    (words,) = warnings_of(msgspec.structs.replace(tuning(), chunk=growing))
    assert "may still grow beyond" in words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn here, because matplotlib keeps its font file open from the first picture on."""
    folder = tmp_path_factory.mktemp("pictures") / "a" / "b"
    drawn = draw_all(tuning(), folder)
    assert [path.name for path in drawn] == ["prefill.png", "decode.png", "handoff.png"]
    return folder


def test_pictures(folder: Path) -> None:
    assert all(path.read_bytes().startswith(PNG) for path in folder.iterdir())
    drawn = draw_all(tuning(handoffs=False), folder)
    assert [path.name for path in drawn] == ["prefill.png", "decode.png"]


def test_decode_points_are_grouped_by_the_length_of_their_sequences() -> None:
    short = [point("decode", decodes=n, kv=80.0 * n + n // 2) for n in (1, 2, 64)]
    long = [point("decode", decodes=n, kv=4000.0 * n) for n in (1, 2)]
    assert by_kv_length([*long, *short][::-1]) == [(80, short), (4000, long)]
