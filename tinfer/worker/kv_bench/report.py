"""The result as text: one line per row, as soon as it is measured."""

from __future__ import annotations

from tinfer.worker.kv_bench.copies import Row

_WAYS = ("ours", "pieces", "one")


def title(hardware: str) -> str:
    """What is above the rows."""
    head = f"{'transport':<17}{'layout':<14}{'page':>9}{'hand-off':>11}{'pieces':>8}{'plan':>9}"
    head += f"{'copy':>10}" + "".join(f"{name + ' GB/s':>13}" for name in _WAYS)
    return f"{hardware}\n{head}{'ours/pieces':>13}{'ours/one':>10}"


def line_of(row: Row) -> str:
    """One row; a way that was not measured is a dash."""
    line = f"{row.transport:<17}{row.layout:<14}{row.page_kib:>5} KiB"
    line += f"{row.size_kib / 1024:>7.1f} MiB{row.num_ranges:>8}{1e3 * row.plan_s:>6.2f} ms"
    line += f"{1e3 * row.seconds['ours']:>7.2f} ms"
    for name in _WAYS:
        line += f"{row.gb_s[name]:>13.1f}" if name in row.gb_s else f"{'-':>13}"
    for name, width in (("pieces", 13), ("one", 10)):
        ratio = row.ratio_to.get(name)
        line += f"{'-' if ratio is None else format(ratio, '.2f'):>{width}}"
    return line
