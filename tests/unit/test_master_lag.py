"""The meter of how late the master's loop is."""

from __future__ import annotations

import asyncio
import time

from tinfer.master.lag import BOUNDS_S, LagMeter


def test_a_turn_counts_below_the_first_bound_that_it_keeps() -> None:
    meter = LagMeter(lambda: True)
    for lag_s in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, BOUNDS_S[-1] * 2):
        meter.add(lag_s)
    assert (meter.counts[0], meter.counts[1], meter.counts[-1]) == (2, 1, 1)
    assert sum(meter.counts) == 4


async def test_a_loop_that_is_held_up_is_late() -> None:
    meter = LagMeter(lambda: True)
    meter.start()
    await asyncio.sleep(0.02)
    time.sleep(0.06)  # noqa: ASYNC251 - what it is to find
    await asyncio.sleep(0.02)
    meter.stop()
    late = sum(
        count for bound_s, count in zip(BOUNDS_S, meter.counts, strict=False) if bound_s > 0.05
    )
    assert late + meter.counts[-1] >= 1


async def test_it_counts_nothing_once_it_is_stopped() -> None:
    meter = LagMeter(lambda: True)
    meter.stop()
    meter.start()
    await asyncio.sleep(0.02)
    meter.stop()
    meter.stop()
    counts = list(meter.counts)
    await asyncio.sleep(0.02)
    assert meter.counts == counts and sum(counts) > 0


async def test_it_looks_rarely_while_nobody_waits() -> None:
    meter = LagMeter(lambda: False)
    meter.start()
    await asyncio.sleep(0.05)
    meter.stop()
    assert sum(meter.counts) == 0
