"""How long grammars may be compiled, and whose fault it is when that takes longer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from tinfer.worker.grammar_watch import GrammarsStuck, GrammarWatch

Work = Future[Any]


@pytest.fixture
def watch() -> GrammarWatch:
    return GrammarWatch(max_compile_s=10.0, max_blocked_s=50.0)


def running() -> Work:
    work = Work()
    work.set_running_or_notify_cancel()
    return work


def test_a_grammar_has_its_time_from_when_a_thread_takes_it(watch: GrammarWatch) -> None:
    work = Work()
    assert not any(watch.is_too_slow(work, now_s) for now_s in (0.0, 100.0, 1000.0))
    work.set_running_or_notify_cancel()
    assert [watch.is_too_slow(work, 1000.0 + s) for s in (0.0, 10.0, 10.1, 20.0)] == [
        False,
        False,
        True,
        True,
    ]


def test_one_that_is_done_is_not_too_slow(watch: GrammarWatch) -> None:
    ends: list[Callable[[Work], None]] = [
        lambda work: work.set_result(1),
        lambda work: work.set_exception(ValueError()),
    ]
    for end in ends:
        work = running()
        assert not watch.is_too_slow(work, 0.0)
        end(work)
        assert not watch.is_too_slow(work, 100.0)


def test_who_waits_behind_a_slow_one_is_not_refused_for_it(watch: GrammarWatch) -> None:
    slow, behind = running(), Work()
    watch.is_too_slow(slow, 0.0)
    assert watch.is_too_slow(slow, 11.0)
    assert not watch.is_too_slow(behind, 50.0)
    # Its request is long gone, its thread is not.
    with pytest.raises(GrammarsStuck, match="for 51 s"):
        watch.is_too_slow(behind, 51.0)


def test_a_slow_one_that_ends_after_all_blocks_nobody(watch: GrammarWatch) -> None:
    slow, behind = running(), Work()
    watch.is_too_slow(slow, 0.0)
    slow.set_result(1)
    assert not watch.is_too_slow(behind, 1000.0)


def test_where_nobody_waits_for_its_thread_a_slow_one_harms_nobody(watch: GrammarWatch) -> None:
    slow, other = running(), running()
    watch.is_too_slow(slow, 0.0)
    assert not watch.is_too_slow(other, 1000.0)
