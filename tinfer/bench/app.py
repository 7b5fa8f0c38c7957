"""`tinfer bench serve` from options to exit code: find the server, warm it up, measure, report."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from tqdm import tqdm

import tinfer
from tinfer.bench import report
from tinfer.bench.interruption import Interrupted, unless_stopped
from tinfer.bench.metrics import figures_of
from tinfer.bench.options import BenchOptions
from tinfer.bench.outcome import LoadRun, Outcome, Planned
from tinfer.bench.plan import check_fits, plan_of, requests_of, warm_ups_of
from tinfer.bench.records import records_of
from tinfer.bench.sender import Sender, frozen_heap, open_session
from tinfer.bench.target import Target, TokenRange, find_target, vocab_size_of
from tinfer.client.aio import TRACE_HEADER
from tinfer.errors import StartError

EXIT_OK = 0
EXIT_NOTHING_COMPLETED = 1
EXIT_INTERRUPTED = 130


def run(options: BenchOptions) -> int:
    """Measure and report; returns the exit code.

    0: the run went to its end, even if some requests failed; 1: no request was answered; 130: it
    was interrupted, and what had come by then is reported. Raises `StartError` and
    `TinferClientError` before any load is sent, `OSError` where a result cannot be written.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(_measure_until_ctrl_c(options))
    except (KeyboardInterrupt, Interrupted):
        return EXIT_INTERRUPTED
    _report(options, result)
    if result["interrupted"]:
        return EXIT_INTERRUPTED
    return EXIT_OK if result["completed"] else EXIT_NOTHING_COMPLETED


async def _measure_until_ctrl_c(options: BenchOptions) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_ctrl_c() -> None:
        stop.set()
        # A second one ends the program at once.
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, on_ctrl_c)
    try:
        return await measure(options, stop)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def measure(options: BenchOptions, stop: asyncio.Event) -> dict[str, Any]:
    """The result of one run, as it is written to JSON; `stop` ends it early.

    Raises `StartError`, `TinferClientError` and `Interrupted` before any load is sent.
    """
    target = await unless_stopped(
        find_target(options.base_url, options.model, options.headers, options.ready_timeout_s), stop
    )
    requests = requests_of(options)
    check_fits(requests, target)
    vocab_size, source = (
        vocab_size_of(target) if options.vocab_size is None else (options.vocab_size, "option")
    )
    tokens = TokenRange.within(vocab_size)
    wants_trace = target.is_tinfer if options.trace is None else options.trace
    headers = {**options.headers, **({TRACE_HEADER: "1"} if wants_trace else {})}
    plan = plan_of(requests, target, tokens, options)
    warm_ups = warm_ups_of(requests, target, tokens, options)
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    load = await _send(options, target, headers, warm_ups, plan, stop)
    result = {
        "date": date,
        "version": tinfer.__version__,
        **_settings(options, target),
        "vocab_size": vocab_size,
        "vocab_size_source": source,
        "trace": wants_trace,
        "offered_rate": _offered_rate(plan),
        "interrupted": load.interrupted,
        **figures_of(load, options.metrics, options.percentiles, options.slo),
    }
    if options.save_detailed or options.plot_dir is not None:
        result["records"] = records_of(requests, load.outcomes)
    return result


async def _send(
    options: BenchOptions,
    target: Target,
    headers: Mapping[str, str],
    warm_ups: Sequence[Planned],
    plan: Sequence[Planned],
    stop: asyncio.Event,
) -> LoadRun:
    url = target.base_url + options.endpoint
    async with open_session(headers, options.max_concurrency) as session:
        if warm_ups:
            with _progress(options, "warm-up", len(warm_ups)) as on_end:
                warm = await Sender(session, url, options.max_concurrency, on_end).run(
                    warm_ups, stop
                )
            _check_warm(warm)
        if stop.is_set():
            return LoadRun(
                outcomes=[], duration_s=0.0, cpu_s=0.0, interrupted=True, num_not_sent=len(plan)
            )
        with _progress(options, "requests", len(plan)) as on_end, frozen_heap():
            return await Sender(session, url, options.max_concurrency, on_end).run(plan, stop)


def _check_warm(warm: LoadRun) -> None:
    failed = [outcome for outcome in warm.outcomes if outcome.error is not None]
    if failed:
        raise StartError(
            f"{len(failed)} of {len(warm.outcomes)} warm-up requests failed: {failed[0].error}"
        )


@contextmanager
def _progress(options: BenchOptions, words: str, total: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on standard error; what is yielded moves it on by one."""
    with tqdm(
        total=total, desc=words, unit="req", file=sys.stderr, disable=not options.show_progress
    ) as bar:

        def on_end(_: Outcome) -> None:
            bar.update(1)

        yield on_end


def _settings(options: BenchOptions, target: Target) -> dict[str, Any]:
    """What was asked for, by the names of vLLM's result where it has them."""
    return {
        "label": options.label,
        "base_url": target.base_url,
        "endpoint": options.endpoint,
        "model_id": target.model,
        "is_tinfer": target.is_tinfer,
        "workload": options.workload,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "length_scale": options.length_scale,
        "max_prompt_tokens": options.max_prompt_tokens,
        "max_output_tokens": options.max_output_tokens,
        "workload_options": options.workload_options,
        "num_prompts": options.num_prompts,
        "seed": options.seed,
        "salt": options.salt,
        "request_rate": _or_inf(options.request_rate),
        "burstiness": _or_inf(options.burstiness),
        "max_concurrency": options.max_concurrency,
        "wait_for_turns": options.wait_for_turns,
        "num_warmups": options.num_warmups,
        "temperature": options.temperature,
        "goodput_slo_ms": None if options.slo is None else options.slo.bounds(),
    }


def _or_inf(value: float | None) -> float | str | None:
    """JSON has no infinity; vLLM spells an infinite rate this way."""
    return "inf" if value == math.inf else value


def _offered_rate(plan: Sequence[Planned]) -> float | None:
    """Requests per second of the plan; None where all come at once."""
    last_s = max(one.planned_s for one in plan)
    return len(plan) / last_s if last_s > 0 else None


def _report(options: BenchOptions, result: dict[str, Any]) -> None:
    written = dict(result)
    if not options.save_detailed:
        written.pop("records", None)
    text = msgspec.json.format(msgspec.json.encode(written), indent=2).decode()
    if options.json_path == "-":
        sys.stdout.write(text + "\n")
    else:
        lines = report.table(result, options.metrics, options.percentiles)
        sys.stdout.write("\n".join(lines) + "\n")
        if options.json_path is not None:
            Path(options.json_path).write_text(text + "\n")
    for warning in report.warnings(result):
        sys.stderr.write(f"tinfer: warning: {warning}\n")
    if options.plot_dir is not None:
        from tinfer.bench.plots import draw_all

        for path in draw_all([msgspec.to_builtins(result)], options.plot_dir):
            sys.stderr.write(f"drawn: {path}\n")


def plot_files(files: Sequence[Path], folder: Path) -> int:
    """Draw results that were written before; returns the exit code.

    Raises `StartError` for a file that is no result or results with nothing to draw, `OSError`.
    """
    from tinfer.bench.plots import draw_all

    drawn = draw_all([_read(path) for path in files], folder)
    if not drawn:
        raise StartError("nothing to draw: no records, and no goodput over a finite load")
    sys.stdout.writelines(f"{path}\n" for path in drawn)
    return EXIT_OK


def _read(path: Path) -> dict[str, Any]:
    try:
        result = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartError(f"{path} is no result of tinfer bench: {error}") from error
    if not isinstance(result, dict) or "request_throughput" not in result:
        raise StartError(f"{path} is no result of tinfer bench")
    return result
