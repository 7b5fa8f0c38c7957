"""`tinfer bench handoff`: its buffers, its baselines, what it measures and what it shows."""

from __future__ import annotations

import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import tinfer.worker.kv_bench.app as app
from tinfer.cli import main
from tinfer.errors import StartError
from tinfer.worker.kv.geometry import copy_plan
from tinfer.worker.kv_bench import pieces
from tinfer.worker.kv_bench.cache import fragmented, kv_geometry
from tinfer.worker.kv_bench.copies import Bench
from tinfer.worker.kv_bench.exporter import exporter
from tinfer.worker.kv_bench.options import NUM_LAYERS, HandoffOptions
from tinfer.worker.kv_bench.report import line_of, title

SMALL = 64 << 20
CPU = torch.device("cpu")


def test_a_fragmented_cache_has_every_block_once_and_few_in_a_row() -> None:
    free = fragmented(4096, random.Random(1))
    assert sorted(free) == list(range(4096))
    near = sum(abs(a - b) == 1 for a, b in zip(free, list(free)[1:], strict=False))
    assert near < 4000  # in one piece it would be 4095


@pytest.mark.parametrize(
    ("layout", "num_ranges"), [("layers-first", 2 * NUM_LAYERS), ("blocks-first", 2)]
)
def test_what_lies_together_is_one_piece(layout: Any, num_ranges: int) -> None:
    geometry = kv_geometry(layout, SMALL, 8192)
    plan = copy_plan(geometry, geometry, [[3, 9]], [[4, 1]])
    assert len(plan.sizes) == num_ranges
    assert plan.num_bytes == 2 * NUM_LAYERS * 8192


def test_the_c_loop_copies_just_the_pieces() -> None:
    copy = pieces.compiled()
    if copy is None:
        assert not any(map(shutil.which, ("cc", "gcc", "clang")))
        return
    source, target = np.arange(1000, dtype=np.uint8), np.zeros(1000, np.uint8)
    to, of, sizes = (np.array(column, np.int64) for column in ([5, 90], [700, 0], [3, 10]))
    copy(target.ctypes.data, source.ctypes.data, to, of, sizes)
    wanted = np.zeros(1000, np.uint8)
    wanted[5:8], wanted[90:100] = source[700:703], source[:10]
    assert (target == wanted).all()


def test_without_a_compiler_there_is_no_such_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert pieces.compiled() is None
    with exporter("shm", "layers-first", CPU, SMALL, 8192) as offer:
        bench = Bench("shm", offer, CPU, None, 1)
        row = bench.row("layers-first", 8, bench.num_blocks(512), rounds=1)
        bench.close()
    assert set(row.gb_s) == {"ours", "one"}
    assert line_of(row).split()[-2:] == ["-", f"{row.ratio_to['one']:.2f}"]


@pytest.mark.parametrize("layout", ["layers-first", "blocks-first"])
def test_one_transport_measured(layout: Any) -> None:
    with exporter("shm", layout, CPU, SMALL, 64 << 10) as offer:
        bench = Bench("shm", offer, CPU, pieces.compiled(), 1)
        bench.check()
        row = bench.row(layout, 64, bench.num_blocks(5000), rounds=2)
        whole = bench.row(layout, 64, bench.num_blocks(1 << 20), rounds=1)
        bench.close()
    assert (row.num_blocks, row.size_kib) == (2, 2 * NUM_LAYERS * 64)
    assert whole.num_blocks == offer.geometry.num_blocks // 4  # and no more than a quarter
    assert row.plan_s > 0 and set(row.seconds) == set(row.gb_s) >= {"ours", "one"}
    for name, ratio in row.ratio_to.items():
        assert row.least_ratio_to[name] <= ratio <= row.largest_ratio_to[name]
    assert len(title("box").splitlines()[1]) == len(line_of(row))


def test_wrong_bytes_are_never_timed() -> None:
    with exporter("shm", "layers-first", CPU, SMALL, 8192) as offer:
        bench = Bench("shm", offer, CPU, None, 1)
        bench.ours = lambda plan: None  # type: ignore[method-assign]
        with pytest.raises(StartError, match="wrong bytes"):
            bench.check()
        bench.close()


def test_an_exporter_that_dies_is_an_error() -> None:
    with (
        pytest.raises(StartError, match="exporting process ended"),
        exporter("host", "layers-first", CPU, -1, 8192),
    ):
        pass


# --- command line -----------------------------------------------------------------------------


def handoff(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "handoff", *arguments])


def test_every_flag_reaches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[HandoffOptions] = []

    def run(options: HandoffOptions) -> int:
        given.append(options)
        return 0

    monkeypatch.setattr(app, "run", run)
    assert handoff().exit_code == 0
    words = "--device cpu --layouts blocks-first --pages 16 --sizes 64,128 --rounds 2 --seed 9"
    words += f" --buffer-bytes {1 << 28} --json x.json --plot {tmp_path}"
    assert handoff(*shlex.split(words)).exit_code == 0
    assert given == [
        HandoffOptions(),
        HandoffOptions(
            device="cpu",
            layouts=("blocks-first",),
            pages=(16,),
            sizes=(64, 128),
            buffer_bytes=1 << 28,
            rounds=2,
            seed=9,
            json_path="x.json",
            plot_dir=tmp_path,
        ),
    ]


@pytest.mark.parametrize(
    "words",
    [
        *("--layouts best", "--layouts ,", "--pages 0", "--pages x", "--pages 4096", "--sizes 0"),
        *("--sizes ,", "--buffer-bytes 1", "--rounds 0", "--seed -1"),
        *("--device tpu", "--device cuda:99", "--device gibberish"),
        *("--json /no/such/folder/x.json", "--plot /dev/null/x"),
    ],
)
def test_a_bad_value_is_refused(words: str) -> None:
    result = handoff(*shlex.split(words))
    assert result.exit_code == 2 and result.stdout == ""
    assert words.split()[0] in result.stderr or "cannot write" in result.stderr
