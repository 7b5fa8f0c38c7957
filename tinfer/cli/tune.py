"""`tinfer tune`: read the options, measure, show and store, turn the end into an exit code.

`--json` writes one object, the same that is stored; its keys are the fields of `Tuning` in
tinfer/tune/tuning.py and of the structs within it:

  version       of this format
  identity      for what it holds: device, num_threads, model_hash, weights_bytes, dtype,
                tensor_parallel_size, is_eager
  model         as it was named; transport: how KV blocks moved, "none" without a hand-off
  versions      of tinfer, python and the engine's packages; date (UTC); repeats; seed
  loop_s        what a worker spends between two steps; part of every sample of a step
  waited_share  of the worker's time, spent waiting for its core; in no sample
  kv            num_blocks, block_tokens, kv_bytes, bytes_per_token, max_num_seqs, max_model_len,
                step_tokens of the worker that was measured
  steps         per point: kind (prefill, later-chunk, decode, mixed), prefill_tokens,
                context_tokens, num_decodes, kv_tokens, samples_s
  handoffs      per point: tokens, num_bytes, samples_s, copy_samples_s
  fit           costs (a CostModel of tinfer/core/costs.py), errors by kind, handoff_measured
  chunk         threshold_tokens, chunk_tokens, best_tokens_per_s, is_saturated
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinfer import config as configuration
from tinfer.cli.ending import ended
from tinfer.cli.options import options_of
from tinfer.cli.outputs import check_writable, json_option, plot_option

if TYPE_CHECKING:
    from tinfer.tune.tuning import Tuning

# The options of `tinfer serve` that change what is measured.
SHARED = (
    "revision",
    "prefill_devices",
    "decode_devices",
    "kv_transport",
    "tensor_parallel_size",
    "cpu_threads",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "enforce_eager",
    "trust_remote_code",
    "start_timeout",
    "log_dir",
    "engine",
    "fake_engine",
)
_OTHERS = frozenset(configuration.ServeConfig.__struct_fields__) - set(SHARED)
_EPILOG = """
\b
Prefill: prompts alone in a step, of 16 tokens up to --max-chunk, and later
chunks of long ones. The chunk to serve with is the smallest of these sizes
with 95 % of the best throughput, in whole KV blocks, from 128 to 8192.
Decode: 1, 2, 4 ... sequences at two lengths of their KV. Hand-off: whole
ones between two workers of this box, from the order to the report; not on
a box with one GPU. The costs are fitted to the medians with the least
relative squares; prompts beside sequences that decode are a check only.
\b
Nothing else should compute meanwhile: a line says so if it did. What a
worker waited for its core is taken out of the steps' times, as the kernel
counts it, but not what it lost by sharing caches and memory.
\b
The tuning is stored in $XDG_CACHE_HOME/tinfer/tune (~/.cache by default),
one file per device, number of threads, model, dtype and tensor-parallel
size. The object of --json is the same; tinfer/cli/tune.py says what its
keys mean.
\b
Exit status: 0 when it was measured and stored; 2 where it cannot be; 130
after Ctrl-C, and then nothing is stored.
"""


@click.command("tune", epilog=_EPILOG)
@click.argument("model", required=False)
@click.option(
    "--max-chunk",
    type=click.IntRange(min=16),
    default=8192,
    show_default=True,
    help="Largest prompt to measure in one step, in tokens.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Visits of each point, fewer of those that take seconds.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the prompts, which are random.",
)
@click.option("--stored", is_flag=True, help="Show what is stored; measures nothing.")
@json_option("Write the tuning here too; - is standard output, and then only JSON.")
@plot_option("Draw prefill.png, decode.png and handoff.png there.")
@options_of(configuration.ServeConfig, skip=_OTHERS)
def command(
    max_chunk: int,
    repeats: int,
    seed: int,
    stored: bool,
    json_path: str | None,
    plot_dir: Path | None,
    **values: Any,
) -> None:
    """Measure what the scheduler counts with: chunk size, costs of a step and a hand-off, KV room.

    MODEL is as for `tinfer serve`, and so are the options that both have: measure with those that
    you serve with. Takes minutes on a CPU.
    """

    def tuned() -> int:
        check_writable(json_path, plot_dir)
        tuning = _of(values, max_chunk, repeats, seed, stored)
        _report(tuning, json_path, plot_dir)
        return 0

    sys.exit(ended(tuned))


def _of(values: dict[str, Any], max_chunk: int, repeats: int, seed: int, stored: bool) -> Tuning:
    config = configuration.load({**values, "max_num_batched_tokens": max_chunk, "seed": seed})
    from tinfer.tune import store
    from tinfer.tuner import app

    if stored:
        return app.stored(config)
    options = app.TuneOptions(
        config=config, repeats=repeats, seed=seed, show_progress=sys.stderr.isatty()
    )
    try:
        tuning = app.tune(options)
    except app.Interrupted as end:
        sys.exit(128 + end.number)
    path = store.save(tuning)
    click.echo(f"stored: {path}", err=True)
    return tuning


def _report(tuning: Tuning, json_path: str | None, plot_dir: Path | None) -> None:
    from tinfer.tune.store import encode
    from tinfer.tune.table import lines_of, warnings_of

    if json_path == "-":
        click.echo(encode(tuning), nl=False)
    else:
        click.echo("\n".join(lines_of(tuning)))
        if json_path is not None:
            Path(json_path).write_bytes(encode(tuning))
    for warning in warnings_of(tuning):
        click.echo(f"tinfer: warning: {warning}", err=True)
    if plot_dir is not None:
        from tinfer.tune.plots import draw_all

        for path in draw_all(tuning, plot_dir):
            click.echo(f"drawn: {path}", err=True)
