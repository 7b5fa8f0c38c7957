"""docs/benchmarks.md is what the code says: workloads, record keys, flags, sizes of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tinfer.bench.heavy_model import HEAD_SIZE, NUM_KV_HEADS, SIZES
from tinfer.bench.prefill_cost import NUM_REPEATS, OUTPUT_TOKENS, PROMPT_TOKENS
from tinfer.bench.records import BenchRecord
from tinfer.bench.report import CPU_SHARE_LIMIT, LAG_LIMIT_MS
from tinfer.cli import bench, serve
from tinfer.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "benchmarks.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    level, found = title.split()[0], DOCUMENT.split(f"\n{title}\n")
    assert len(found) == 2, f"{title} is there {len(found) - 1} times"
    return re.split(rf"\n#{{1,{len(level)}}} ", found[1])[0]


def rows(text: str) -> list[str]:
    """The table's rows without its head."""
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


def workload_row(workload: Workload) -> str:
    rate = workload.own_rate_rps
    settings = ", ".join(f"`{name}` {o.default:g}" for name, o in workload.options.items())
    shown = "at once" if rate is None else f"{rate:g}"
    return f"| `{workload.name}` | {workload.description} | {shown} | {settings or '–'} |"


def size_rows() -> Iterator[str]:
    for name, shape in SIZES.items():
        kv_bytes = 2 * 2 * shape.num_layers * NUM_KV_HEADS * HEAD_SIZE
        yield (
            f"| `{name}` | {shape.num_layers} | {shape.hidden_size} "
            f"| {shape.num_parameters / 1e6:.1f} M | {shape.weights_bytes >> 20} MiB "
            f"| {kv_bytes / 1024:g} KiB |"
        )


def test_every_workload_is_there_as_it_is() -> None:
    assert rows(section("## Workloads")) == [workload_row(one) for one in WORKLOADS.values()]


def test_every_key_of_a_record_is_there() -> None:
    keys = [key for row in rows(section("## The request log")) for key in first_cell(row)]
    assert sorted(keys) == sorted(BenchRecord.__struct_fields__)


def first_cell(row: str) -> list[str]:
    return re.findall(r"`(\w+)`", row.split("|")[1])


def test_every_size_is_there_as_it_is() -> None:
    assert rows(section("## `tinfer bench model`")) == list(size_rows())


@pytest.mark.parametrize("name", [*bench.command.commands, "compare"])
def test_every_command_has_its_section(name: str) -> None:
    assert f"\n## `tinfer bench {name}`\n" in DOCUMENT
    assert f"| `tinfer bench {name}` |" in DOCUMENT


def test_every_flag_that_it_names_is_one() -> None:
    commands: list[click.Command] = [*bench.command.commands.values(), serve.command]
    options = [option for one in commands for option in one.params]
    known = {flag for one in options for flag in (*one.opts, *one.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", DOCUMENT.replace("(#", "")))
    assert len(named) > 15 and named - known == set()


def test_the_numbers_in_its_text_are_those_of_the_code() -> None:
    text = " ".join(DOCUMENT.split())
    assert f"Above {CPU_SHARE_LIMIT} of a core, or {LAG_LIMIT_MS:g} ms late at p99" in text
    times = f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out, {NUM_REPEATS} times"
    assert times in text
    assert f"Heads have {HEAD_SIZE} dimensions, {NUM_KV_HEADS} of them hold keys" in text


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", DOCUMENT)
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target
