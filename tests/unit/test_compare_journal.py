"""What a comparison measured is on disk at once; only the same comparison goes on from there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from tests.unit.test_compare_charts import ARMS, run_of
from tinfer.bench.compare.capacity import Verdict
from tinfer.bench.compare.journal import Alone, Ended, Found, journal_path, opened
from tinfer.bench.compare.limits import Unloaded
from tinfer.bench.compare.options import CompareOptions
from tinfer.bench.compare.recorded import FullLoad, Probe, Recorded, Run
from tinfer.bench.target import Target
from tinfer.errors import StartError

TARGET = Target(base_url="http://x", model="m", max_model_len=9, root="/m", is_tinfer=False)
UNLOADED = Unloaded(num_requests=3, ttft_s=0.1, tpot_s=None, mean_e2el_s=1.0, longest_e2el_s=2.0)
VERDICT = Verdict(bounded=True, growth_rps=0.1, drain_s=1.0, max_drain_s=2.0, num_failed=0)
ALONE = Alone(target=TARGET, vocab_size=264, unloaded={"LPLD": UNLOADED})
FOUND = Found(
    workload="Mixed",
    full_load=FullLoad(
        rate_rps=4.0, arm="a", probes=[Probe(arm="a", rate_rps=4.0, verdict=VERDICT)]
    ),
)


def options_in(folder: Path, **changes: Any) -> CompareOptions:
    return replace(CompareOptions(cores=(0, 1), json_path=str(folder / "r.json")), **changes)


def ended(*runs: tuple[str, int]) -> list[Ended]:
    return [Ended(run=run_of(arm, repetition, 1.0)) for arm, repetition in runs]


def measured(options: CompareOptions, *entries: Alone | Found | Ended) -> Path:
    """A comparison that measured this and was killed; returns its journal."""
    journal, _ = opened(options, ARMS, "monday")
    for entry in entries:
        journal.add(entry)
    path = journal_path(options)
    assert path is not None
    left = path.read_bytes()
    journal.close(remove=True)
    path.write_bytes(left)
    return path


def resumed(options: CompareOptions) -> Recorded:
    journal, recorded = opened(replace(options, resume=True), ARMS, "tuesday")
    journal.close(remove=False)
    return recorded


def same(one: Run, other: Run) -> bool:
    arrays = [
        (run.sample.ok, run.sample.good["tight"], run.sample.latency_s["ttft"], run.sample.itl_s)
        + (run.sample.itl_owner, run.sample.output_tokens)
        for run in (one, other)
    ]
    for left, right in zip(*arrays, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    return (one.step, one.figures, one.sample.resource_s) == (
        (other.step, other.figures, other.sample.resource_s)
    )


def test_what_was_measured_comes_back_to_the_last_digit(tmp_path: Path) -> None:
    options = options_in(tmp_path)
    runs = ended(("replicas", 0), ("ours", 0))
    runs[0].run.sample.latency_s["ttft"][3] = np.nan
    measured(options, ALONE, FOUND, *runs)
    found = resumed(options)
    assert (found.target, found.vocab_size) == (TARGET, 264)
    assert found.unloaded == {"LPLD": UNLOADED} and found.full_load == {"Mixed": FOUND.full_load}
    assert [same(one.run, other) for one, other in zip(runs, found.runs, strict=True)] == [True] * 2
    assert found.resumed == ["monday"] and resumed(options).resumed == ["monday", "tuesday"]


def test_a_line_that_was_cut_is_left_out_and_gone(tmp_path: Path) -> None:
    options = options_in(tmp_path)
    path = measured(options, ALONE, *ended(("replicas", 0), ("ours", 0), ("ours", 1)))
    path.write_bytes(path.read_bytes()[:-20])
    assert len(resumed(options).runs) == 2
    assert b"\n" == path.read_bytes()[-1:] and len(resumed(options).runs) == 2


def test_a_repetition_goes_on_only_where_its_arms_do_not_follow_each_other(tmp_path: Path) -> None:
    for residency, num_kept in (("together", 2), ("alone", 3)):
        options = options_in(tmp_path, residency=residency)
        path = measured(options, ALONE, *ended(("replicas", 0), ("ours", 0), ("ours", 1)))
        assert len(resumed(options).runs) == num_kept
        path.unlink()


def test_only_the_same_comparison_goes_on(tmp_path: Path) -> None:
    options = options_in(tmp_path)
    path = measured(options, ALONE)
    before = path.read_bytes()
    with pytest.raises(StartError, match=r"did not end: --resume goes on with it, or remove it$"):
        opened(options, ARMS, "tuesday")
    with pytest.raises(
        StartError, match=r"another comparison: num_requests is 100 there, and 7 here$"
    ):
        resumed(replace(options, num_requests=7))
    with pytest.raises(StartError, match=r"another comparison: arms is \["):
        opened(replace(options, resume=True), ARMS[:1], "tuesday")
    assert path.read_bytes() == before
    # What only tells how it is reported may differ.
    assert resumed(replace(options, num_resamples=5, plot_dir=tmp_path)).unloaded


def test_what_is_no_journal_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "r.json.journal").write_text("dear diary\n")
    with pytest.raises(StartError, match="is no journal of a comparison"):
        resumed(options_in(tmp_path))
    assert (tmp_path / "r.json.journal").read_text() == "dear diary\n"


def test_it_goes_when_it_is_not_needed_any_more(tmp_path: Path) -> None:
    options = options_in(tmp_path)
    for entries, remove, is_left in (((), False, False), ((ALONE,), False, True)):
        journal, _ = opened(options, ARMS, "monday")
        for entry in entries:
            journal.add(entry)
        journal.close(remove=remove)
        assert any(tmp_path.iterdir()) == is_left
    journal, _ = opened(replace(options, resume=True), ARMS, "tuesday")
    journal.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_was_killed_is_in_nobodys_way(tmp_path: Path) -> None:
    path = measured(options_in(tmp_path))
    assert path.exists()
    journal, recorded = opened(options_in(tmp_path, num_requests=7), ARMS, "tuesday")
    journal.close(remove=False)
    assert recorded == Recorded()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, _ = opened(options_in(tmp_path), ARMS, "monday")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StartError, match=r"r\.json\.journal: No space left on device$"):
        journal.add(ALONE)
    journal.close(remove=False)


def test_without_a_file_nothing_is_kept_and_nothing_resumed(tmp_path: Path) -> None:
    for json_path in (None, "-"):
        options = options_in(tmp_path, json_path=json_path)
        journal, recorded = opened(options, ARMS, "monday")
        journal.add(ALONE)
        journal.close(remove=False)
        assert recorded == Recorded() and list(tmp_path.iterdir()) == []
        with pytest.raises(StartError, match="there is no FILE"):
            resumed(options)
