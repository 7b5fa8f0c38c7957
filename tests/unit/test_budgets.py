"""Files and functions stay small enough to be read in one go, and hold no unfinished work."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
FOLDERS = ("tinfer", "tests", "bin", "benchmarks", "examples")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(path for path in (ROOT / "bin").iterdir() if path.is_file())
# Written apart, so that this file does not hold them.
UNFINISHED = re.compile(
    r"\b(TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error|pytest\.sk" r"ip)\b"
)


def long_functions(source: str, limit: int) -> list[str]:
    """Return "name: lines" for every function of more than `limit` lines."""
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= limit
    ]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PYTHON, *SCRIPTS], ids=name)
def test_file_is_within_budget(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines: split it by concept"


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_functions_are_within_budget(path: Path) -> None:
    assert long_functions(path.read_text(), MAX_FUNCTION_LINES) == []


@pytest.mark.parametrize("path", [*PYTHON, *SCRIPTS], ids=name)
def test_nothing_is_left_unfinished(path: Path) -> None:
    if path.is_relative_to(ROOT / "tests" / "gpu"):
        return
    assert UNFINISHED.findall(path.read_text()) == []


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [name(path) for path in PYTHON if path.name in drawers] == []


def test_the_function_budget_sees_long_functions() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 3, 4) == []
    assert long_functions("async def f():\n" + "    x = 1\n" * 4, 4) == ["f: 5"]


def test_the_unfinished_word_list_finds_its_words() -> None:
    assert UNFINISHED.findall("# TO" + "DO: later") == ["TO" + "DO"]
    assert UNFINISHED.findall("raise NotImplemented" + "Error") == ["NotImplemented" + "Error"]
    assert UNFINISHED.findall("todo = 1; pytest.skipped") == []


def test_every_folder_of_tests_has_a_time_budget_and_no_other() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    budgets = tomllib.loads((ROOT / "tests" / "budgets.toml").read_text())
    assert budgets.keys() == folders
    for budget in budgets.values():
        assert {"wall_s"} <= budget.keys() <= {"wall_s", "timeout_s"}
        assert 0 < budget.get("timeout_s", 1) <= budget["wall_s"]
