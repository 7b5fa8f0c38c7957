"""docs/top.md is what `tinfer top` writes and takes: keys of its JSON, flags, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec import Struct

from tinfer.cli import top
from tinfer.top.view import (
    Handoffs,
    Lengths,
    Requests,
    Timing,
    View,
    Waiting,
    WorkerView,
)

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "top.md").read_text()


def first_cells(head: str) -> list[str]:
    """The words in code of the first column of the table with this head."""
    rows = DOCUMENT.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.mark.parametrize(
    ("head", "struct"),
    [
        ("key", View),
        ("key of `requests`", Requests),
        ("key of a time", Timing),
        ("key of a worker", WorkerView),
        ("key of a waiting request", Waiting),
        ("key of `handoffs`", Handoffs),
        ("key of `lengths`", Lengths),
    ],
)
def test_every_key_is_there(head: str, struct: type[Struct]) -> None:
    named = first_cells(head)
    assert len(named) == len(set(named))
    assert set(named) == {*struct.__struct_fields__}


def test_every_flag_is_there_and_no_other() -> None:
    known = {flag for option in top.command.params for flag in option.opts if flag[0] == "-"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", DOCUMENT))
    # The key is better in the environment, and shown there.
    assert named | {"--api-key"} == known


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCUMENT)
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target
