"""docs/batch.md is what the code says: codes of errors, keys of the summary, flags, names."""

from __future__ import annotations

import re
import typing
from pathlib import Path

from tinfer.batch.lines import ErrorCode
from tinfer.batch.summary import Summary
from tinfer.cli import batch, serve
from tinfer.offline import CompletionOutput

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "batch.md").read_text()


def first_cells(head: str) -> list[str]:
    """The words in code of the first column of the table with this head."""
    rows = DOCUMENT.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_every_code_of_an_error_is_there() -> None:
    assert first_cells("code") == [*typing.get_args(ErrorCode)]


def test_every_key_of_the_summary_is_there() -> None:
    assert first_cells("key") == [*Summary.__struct_fields__]


def test_every_flag_that_it_names_is_one() -> None:
    options = [*batch.command.params, *serve.command.params]
    known = {flag for option in options for flag in option.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", DOCUMENT))
    assert len(named) > 8 and named - known == set()


def test_every_attribute_of_an_output_is_there() -> None:
    assert all(f"`{name}`" in DOCUMENT for name in CompletionOutput.__struct_fields__)


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", DOCUMENT)
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target
