"""docs/config.md is what the code says: the option table, and every variable that is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinfer.cli import config_table
from tinfer.cli.serve import command

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "config.md").read_text()
# Set by tinfer for its own workers, or every program's; nothing that a user sets for tinfer.
INTERNAL = {
    "PATH",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_RPC_BASE_PATH",
    "VLLM_WORKER_MULTIPROC_METHOD",
}


def test_the_table_is_the_one_of_the_code() -> None:
    assert config_table.replaced(DOCUMENT) == DOCUMENT, (
        "run python -m tinfer.cli.config_table docs/config.md"
    )


def test_every_option_is_there_with_its_meaning() -> None:
    rows = [line for line in config_table.table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(command.params)
    assert all(not re.search(r"\|\s*\|", row) for row in rows), "a cell is empty"


def test_a_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="options: start"):
        config_table.replaced("# Configuration\n")


def test_every_environment_variable_is_documented() -> None:
    read = set()
    for path in (ROOT / "tinfer").rglob("*.py"):
        text = path.read_text()
        read |= set(re.findall(r"""environ(?:\.get\(|\[)["']([A-Z_]+)["']""", text))
        read |= set(re.findall(r"""getenv\(["']([A-Z_]+)["']""", text))
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", DOCUMENT))
    assert read - documented - INTERNAL == set()
