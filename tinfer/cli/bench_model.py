"""`tinfer bench model`: make the compute-heavy model, and say what it costs on this box."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tinfer.cli.ending import ended
from tinfer.cli.outputs import check_writable, json_option

if TYPE_CHECKING:
    from tinfer.bench.prefill_cost import PrefillCost

# As tinfer.bench.heavy_model has them, which is not loaded for --help; a test compares.
SIZE_NAMES = ("50m", "100m", "150m")
_EPILOG = """
\b
Exit status: 0 when the model is there, made now or before; 2 where it
cannot be made or measured; 130 after Ctrl-C.
\b
The result of --json is one object: "path"; "size"; "seed";
"num_parameters"; "weights_bytes"; "made", false where the model was there
already; "measured", null without --measure, else "cpu_threads" and the
fields of tinfer/bench/prefill_cost.py.
"""


@click.command("model", epilog=_EPILOG)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--size",
    type=click.Choice(SIZE_NAMES),
    default=SIZE_NAMES[0],
    show_default=True,
    help="Parameters, in millions.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Fixes the weights, on every machine the same ones.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Serve it with one worker, and say how many decode steps a 1K-token prefill costs.",
)
@click.option(
    "--cpu-threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPU threads of the worker of --measure.",
)
@json_option()
def command(
    folder: Path, size: str, seed: int, measure: bool, cpu_threads: int, json_path: str | None
) -> None:
    """Make a model in DIR that is heavy to compute: a Llama of random weights.

    For measurements on boxes without a GPU, where the built-in model is too small to tell anything.
    What it answers means nothing. A DIR that holds this model already is left as it is; one that
    holds anything else is refused.
    """
    from tinfer.client.errors import TinferClientError

    def made() -> int:
        with _orderly_sigterm():
            check_writable(json_path, None)
            result = _made(folder, size, seed, is_silent=json_path == "-")
            cost = _measured(folder, size, cpu_threads) if measure else None
        if cost is not None:
            result["measured"] = {"cpu_threads": cpu_threads, **msgspec.to_builtins(cost)}
            if json_path != "-":
                click.echo(cost.line())
        _write(result, json_path)
        return 0

    sys.exit(ended(made, TinferClientError))


@contextmanager
def _orderly_sigterm() -> Iterator[None]:
    """SIGTERM removes a half-made model and ends a server on the way out, as Ctrl-C does."""

    def leave(number: int, _: FrameType | None) -> None:
        # A second one must not disturb that.
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _made(folder: Path, size: str, seed: int, is_silent: bool) -> dict[str, Any]:
    from tinfer.bench.heavy_model import SIZES, HeavyModel, make

    shape = SIZES[size]
    is_new = make(folder, HeavyModel(size=size, shape=shape, seed=seed))
    if not is_silent:
        click.echo(
            f"{folder} {'is made' if is_new else 'is up to date'}: {size}, seed {seed}, "
            f"{shape.num_parameters / 1e6:.1f} M parameters, {shape.weights_bytes >> 20} MiB"
        )
    return {
        "path": str(folder),
        "size": size,
        "seed": seed,
        "num_parameters": shape.num_parameters,
        "weights_bytes": shape.weights_bytes,
        "made": is_new,
        "measured": None,
    }


def _measured(folder: Path, size: str, cpu_threads: int) -> PrefillCost:
    """Of a server of its own with one worker that does both phases."""
    from tinfer.bench import prefill_cost
    from tinfer.own_server import OwnServer

    workers = ("--prefill", "1", "--decode", "0", "--route", "whole")
    threads = ("--cpu-threads", str(cpu_threads))
    name = ("--served-model-name", f"heavy-{size}")

    def show(line: str) -> None:
        click.echo(line, err=True)

    with OwnServer((str(folder.resolve()), *name, *workers, *threads), show) as server:
        return prefill_cost.measure(server.url)


def _write(result: dict[str, Any], json_path: str | None) -> None:
    if json_path is None:
        return
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode() + "\n"
    if json_path == "-":
        click.echo(text, nl=False)
    else:
        Path(json_path).write_text(text)
