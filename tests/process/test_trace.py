"""What a live server says of what it did lately agrees with what it told its clients."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tinfer
from tests.process.box import Server, running
from tests.process.load import completion
from tests.unit.trace_box import Event, Seen

STEADY = {"step_s": 0.002, "mean_output_tokens": 1_000_000}
SLOW = {"step_s": 0.02, "mean_output_tokens": 1_000_000}
# Figures and slices are rounded to microseconds, each for itself.
ROUNDING_S = 2.5e-6


def ran(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinfer", "trace", "--url", server.url, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def seen(server: Server, *arguments: str) -> Seen:
    done = await asyncio.to_thread(ran, server, "--output", "-", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    events: list[Event] = json.loads(done.stdout)["traceEvents"]
    return Seen(events)


async def test_a_request_is_shown_as_it_was_told(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=1, decode=1) as server:
        rng = random.Random(1)
        async with tinfer.AsyncClient(server.url, trace=True) as client:
            told: dict[str, dict[str, Any]] = {}
            for name in ("one", "two"):
                answer = await client.completions(
                    [rng.randrange(1, 256) for _ in range(1200)],
                    max_tokens=30,
                    extra={"request_id": name},
                )
                assert answer.id == f"cmpl-{name}" and answer.tinfer is not None
                told[name] = answer.tinfer
        await server.idle()
        everything = await seen(server)
        for name, trace in told.items():
            alone = await seen(server, name)
            assert {one["args"]["sequence"] for one in alone.slices() if "end" in one["args"]} == {
                trace["request_id"]
            }
            phases = [(one[0], one[1]) for one in alone.shown()]
            assert list(dict.fromkeys(phases)) == [
                ("queued", "master"),
                ("prefill", "prefill-0 (prefill)"),
                ("chunk", "prefill-0 (prefill)"),
                ("hand-off", "prefill-0 (prefill)"),
                ("pull", "decode-0 (decode)"),
                ("copy", "decode-0 (decode)"),
                ("decode", "decode-0 (decode)"),
            ]
            for phase, figure in (("queued", "queue_s"), ("prefill", "prefill_s")):
                assert abs(alone.seconds_of(phase) - trace[figure]) < ROUNDING_S
            handed_off_s = alone.seconds_of("hand-off")
            assert abs(handed_off_s - trace["handoff_s"]) < ROUNDING_S
            assert abs(handed_off_s + alone.seconds_of("decode") - trace["decode_s"]) < ROUNDING_S
            assert abs(alone.seconds_of("copy") - trace["copy_s"]) < ROUNDING_S
            assert alone.instants() == [("first token", "prefill-0 (prefill)")]
            assert set(alone.shown_at()) <= set(everything.shown_at())
            by_id = await seen(server, f"cmpl-{name}")
            assert by_id.slices() == alone.slices()
        kinds = {
            (one["cat"], everything.places[one["pid"]])
            for one in everything.events
            if one["ph"] != "M"
        }
        for worker in ("prefill-0 (prefill)", "decode-0 (decode)"):
            assert {("step", worker), ("counter", worker), ("happening", worker)} <= kinds
        server.stop()


async def test_a_death_is_shown_with_what_it_interrupted(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, prefill=1, decode=2) as server:
        requests = [completion([7, 8, number], max_tokens=120) for number in range(6)]
        answers = asyncio.create_task(server.answer(*requests))
        await server.until_phase(decoding=6)
        await server.signal("decode-0", signal.SIGKILL)
        await server.until_worker("decode-0", "ready", generation=2)
        during = await seen(server)
        assert "running" in {one["args"].get("end") for one in during.slices()}
        for request in await answers:
            request.check_answered(server.settings)
        await server.idle(num_finished=6)
        after = await seen(server)
        died = [one for one in after.slices() if one["args"].get("worker_died")]
        assert died and {after.places[one["pid"]] for one in died} == {"decode-0 (decode)"}
        moved = {one["args"]["sequence"] for one in died}
        queued = [one["args"]["sequence"] for one in after.slices("queued")]
        assert {name for name in queued if queued.count(name) == 2} == moved
        instants = after.instants()
        assert instants.index(("worker died", "decode-0 (decode)")) < instants.index(
            ("worker restarted", "decode-0 (decode)")
        )
        server.stop()


async def test_the_command(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=1, decode=1) as server:
        await server.answer(completion([1, 2, 3], max_tokens=3, request_id="mine"))
        path = tmp_path / "trace.json"
        done = await asyncio.to_thread(ran, server, "--seconds", "5", "--output", str(path))
        assert done.returncode == 0, done
        num_events = len(json.loads(path.read_text())["traceEvents"])
        told = f"{path}: {num_events} events; open it in https://ui.perfetto.dev\n"
        assert done.stdout == told
        for arguments, why in (
            (("nobody",), "tinfer: no request 'nobody' is kept"),
            (("--seconds", "0"), "Invalid value for '--seconds'"),
            (("--output", str(tmp_path / "no" / "where")), "tinfer: cannot write"),
        ):
            done = await asyncio.to_thread(ran, server, *arguments)
            assert (done.returncode, done.stdout) == (2, ""), done
            assert why in done.stderr.splitlines()[-1]
        server.stop()
    done = await asyncio.to_thread(ran, server)
    assert done.returncode == 2 and "nothing answers at" in done.stderr


async def test_a_refusal_is_shown(tmp_path: Path) -> None:
    options = {"prefill": 1, "decode": 1, "max_num_queued_reqs": 1}
    with running(tmp_path, {**STEADY, "prefill_token_s": 0.003}, **options) as server:
        crowd = [completion([one] * 200, max_tokens=3) for one in range(1, 13)]
        await server.answer(*crowd)
        num_refused = sum(one.status == 429 for one in crowd)
        assert num_refused
        await server.idle()
        shown = [one for one in (await seen(server)).events if one["name"] == "refused"]
        assert len(shown) == num_refused
        assert {one["args"]["cause"] for one in shown} == {"queue-full"}
        server.stop()
