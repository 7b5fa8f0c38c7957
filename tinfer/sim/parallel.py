"""Many independent pieces of work in processes of their own, with a progress bar, and a clean end.

What goes to a process and comes back is plain data. Ctrl-C is the parent's business: it stops the
processes, and whoever iterates keeps what had come by then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from tqdm import tqdm

TaskT = TypeVar("TaskT")
DoneT = TypeVar("DoneT")


def default_jobs() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0))


def done_in_parallel(
    work: Callable[[TaskT], DoneT],
    tasks: Sequence[TaskT],
    num_jobs: int,
    words: str = "",
    show_progress: bool = False,
) -> Iterator[tuple[int, DoneT]]:
    """(place of the task, what came of it), as they end; in the tasks' order with one job, which is
    then done in this process.

    `work` is a function at a module's top level. What it raises is raised here. When the iteration
    ends early (by an error, Ctrl-C, or because nobody goes on with it) the processes are stopped.
    """
    with tqdm(total=len(tasks), desc=words, file=sys.stderr, disable=not show_progress) as bar:
        if num_jobs == 1 or len(tasks) <= 1:
            for place, task in enumerate(tasks):
                yield place, work(task)
                bar.update(1)
            return
        for place, done in _in_processes(work, tasks, min(num_jobs, len(tasks))):
            bar.update(1)
            yield place, done


def _in_processes(
    work: Callable[[TaskT], DoneT], tasks: Sequence[TaskT], num_jobs: int
) -> Iterator[tuple[int, DoneT]]:
    before = set(multiprocessing.active_children())
    # A forked child would inherit threads' locks in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_jobs, mp_context=context, initializer=_leave_ctrl_c_to_parent)
    is_whole = False
    try:
        places = {pool.submit(work, task): place for place, task in enumerate(tasks)}
        for future in as_completed(places):
            yield places[future], future.result()
        is_whole = True
    finally:
        if not is_whole:
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
