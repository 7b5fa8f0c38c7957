"""For every test: the leak check (see leaks.py), time limits and time budgets per folder."""

from __future__ import annotations

import signal
import tomllib
from collections import defaultdict
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from machine_check import detect_device

from tests.leaks import leak_baseline, no_leaks

__all__ = ["leak_baseline", "no_leaks"]

# Both measure the wall clock, which says nothing on a machine that does other things as well.
exploring = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("exploring", exploring)
# What has to pass before a change lands draws the same examples each time (`bin/test`), so that it
# speaks of that change; `bin/test --full` explores.
settings.register_profile("repeatable", exploring, derandomize=True)
settings.load_profile("exploring")

HERE = Path(__file__).parent
BUDGETS: dict[str, dict[str, float]] = tomllib.loads((HERE / "budgets.toml").read_text())
SPENT_S: pytest.StashKey[defaultdict[str, float]] = pytest.StashKey()


def folder_of(path: Path) -> str:
    """Return the folder below tests/ that a test file belongs to."""
    below = path.relative_to(HERE).parts
    return below[0] if len(below) > 1 else "."


def pytest_configure(config: pytest.Config) -> None:
    """Start Python's own helper process now: it lives until the end, whichever test needs it.

    A shell ignores SIGINT for what it starts in the background, and everything below inherits that:
    tests of Ctrl-C would say more of the shell than of tinfer.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[SPENT_S] = defaultdict(float)
    resource_tracker.ensure_running()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test its folder's time limit; deselect `gpu` tests where there is no GPU.

    Quick folders go first: what they find is known soon, and the servers that the last one keeps
    for its tests burden no other.
    """
    items.sort(key=lambda item: BUDGETS.get(folder_of(item.path), {}).get("wall_s", 0.0))
    for item in items:
        limit_s = BUDGETS.get(folder_of(item.path), {}).get("timeout_s")
        if limit_s is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit_s))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and detect_device() != "cuda":
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """Add up the seconds of set-up, test and tear-down per folder."""
    item.config.stash[SPENT_S][folder_of(item.path)] += call.duration
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print seconds per folder; over budget is a warning, since other work shares the cores."""
    spent_s = terminalreporter.config.stash[SPENT_S]
    terminalreporter.section("seconds per folder")
    for folder, seconds in sorted(spent_s.items()):
        budget_s = BUDGETS.get(folder, {}).get("wall_s")
        note = "no budget in tests/budgets.toml" if budget_s is None else f"of {budget_s:.0f}"
        over = budget_s is None or seconds > budget_s
        line = f"{'WARNING ' if over else ''}tests/{folder}: {seconds:.1f} s {note}"
        terminalreporter.line(line, yellow=over)
