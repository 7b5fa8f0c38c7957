"""`tinfer bench handoff`: read the options, measure, turn the end into an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from tinfer.cli.ending import ended
from tinfer.cli.options import checked
from tinfer.cli.outputs import check_writable, json_option, plot_option

_EPILOG = """
\b
ours: the transport's copy of blocks that a busy cache has scattered.
pieces: memcpy of the same pieces in one C loop, where there is a C
compiler; on a GPU as many pages at even distances in one kernel.
one: as many bytes in one piece; on a GPU one copy on the device.
Transports: shm on a CPU; cuda-ipc by each of its strategies, and host, on a
GPU, between two processes on that one device.
\b
Exit status: 0 when all was measured; 2 for a bad option or where nothing
can be measured; 130 after Ctrl-C, with what was measured by then.
\b
The result of --json is one object; tinfer/worker/kv_bench/app.py says what
its keys mean.
"""


@click.command("handoff", epilog=_EPILOG)
@click.option("--device", metavar="cpu|cuda:N", help="Default: a GPU if there is one.")
@click.option(
    "--layouts",
    default="layers-first,blocks-first",
    show_default=True,
    metavar="NAME,...",
    help="What lies together: the blocks of a layer, or the layers of a block.",
)
@click.option(
    "--pages",
    default="8,64,512",
    show_default=True,
    metavar="KIB,...",
    help="One layer's share of a block.",
)
@click.option(
    "--sizes", default="2048,16384,131072", show_default=True, metavar="KIB,...", help="Hand-offs."
)
@click.option(
    "--buffer-bytes",
    type=click.IntRange(min=1 << 26),
    help="Each of the two KV buffers. Default: 1 GiB on a CPU, 4 GiB on a GPU.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@json_option()
@plot_option("Draw speed over size.")
def command(**given: Any) -> None:
    """Measure how fast KV blocks are copied between two processes, against memcpy.

    By transport, layout, page size and size of the hand-off, out of and into caches that are as
    fragmented as after 10,000 requests. Every copy is of other blocks, the ways take turns, and
    what is copied is compared first. Needs no model.
    """

    def measured() -> int:
        from tinfer.worker.kv_bench import options as handoff

        for name, parse in (
            ("layouts", handoff.parse_layouts),
            ("pages", handoff.parse_kib(2048)),
            ("sizes", handoff.parse_kib(1 << 20)),
        ):
            given[name] = checked(f"--{name}", parse, given[name])
        options = handoff.HandoffOptions(**given)
        check_writable(options.json_path, options.plot_dir)
        from tinfer.worker.kv_bench.app import run

        return run(options)

    sys.exit(ended(measured))
