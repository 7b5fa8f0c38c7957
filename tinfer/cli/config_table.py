"""The table of options in docs/config.md, made from the same struct as the options themselves.

`python -m tinfer.cli.config_table` rewrites it in the file named on the command line; a test fails
where the committed table is not this one.
"""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

import click
import msgspec

from tinfer.cli.serve import command
from tinfer.config import ServeConfig

START, END = "<!-- options: start -->", "<!-- options: end -->"


def table() -> str:
    """One Markdown row per argument and option: flag, what it takes, default, meaning."""
    rows = ["| option | takes | default | meaning |", "|---|---|---|---|"]
    fields = {field.name: field.default for field in msgspec.structs.fields(ServeConfig)}
    for parameter in command.params:
        assert parameter.name is not None
        default = fields.get(parameter.name)
        if isinstance(parameter, click.Option):
            flags = " / ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))
            meaning = (parameter.help or "").replace("|", "\\|")
            cells = (flags, _takes(parameter), _default(default), meaning)
        else:
            cells = ("`MODEL`", "text", _default(default), _meaning_of(parameter.name))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _meaning_of(name: str) -> str:
    """What the struct says of a field that is an argument, not an option."""
    hint = typing.get_type_hints(ServeConfig, include_extras=True)[name]
    return next(str(m.description) for m in hint.__metadata__ if isinstance(m, msgspec.Meta))


def _takes(option: click.Option) -> str:
    kind = option.type
    if option.is_flag:
        return "–"
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        return f"{kind.name.split()[0]} {_bounds(kind)}".rstrip()
    what = option.metavar or kind.name
    return f"{what}, repeatable" if option.multiple else what


def _bounds(kind: Any) -> str:
    parts = []
    if kind.min is not None:
        parts.append(f"{'>' if kind.min_open else '≥'} {kind.min:g}")
    if kind.max is not None:
        parts.append(f"≤ {kind.max:g}")
    return ", ".join(parts)


def _default(value: Any) -> str:
    if value is None or value in ((), {}, msgspec.NODEFAULT):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(value) if isinstance(value, tuple) else value}`"


def replaced(text: str) -> str:
    """`text` with the table between the markers made anew. Raises `ValueError` without markers."""
    before, found, rest = text.partition(START)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        raise ValueError(f"no {START} … {END} in the text")
    return f"{before}{START}\n{table()}\n{END}{after}"


def main() -> None:
    (path,) = map(Path, sys.argv[1:])
    path.write_text(replaced(path.read_text()))


if __name__ == "__main__":
    main()
