"""Real engines stepped by hand, one scenario each, with a record of every step.

`python -m tests.e2e.stepped_engine MODEL OUT` runs all scenarios of `engine_scenarios`, each in a
forked child and two at once, and writes OUT/NAME.json.
"""

from __future__ import annotations

import json
import os
import select
import sys
import traceback
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from tinfer.core.sampling import SamplingSpec
from tinfer.wire.control import WorkerSpec
from tinfer.wire.messages import LeasesEnded, Output, PullDone, Refused, Source, Start

BLOCK_TOKENS = 32
WORKER = "w"
# Pulls, leases and grammars are waited for between steps, for at most so many times so long.
POLL_S = 0.01
MAX_WAITS = 3000
MAX_STEPS = 5000
# Each has one thread.
NUM_AT_ONCE = 2


class Piece(msgspec.Struct, frozen=True):
    """What one request got in one step: tokens, from which on, of how many."""

    start: int
    tokens: int
    prompt_tokens: int
    output_tokens: int  # that it had before the step
    is_decode: bool  # by `Start`: the prompt is to be pulled

    @property
    def budgeted_tokens(self) -> int:
        """Those that fall under a prefill budget: all but the last one of what decodes or has been
        pulled."""
        is_last = self.start == self.prompt_tokens + self.output_tokens - 1
        return 0 if is_last and (self.output_tokens or self.is_decode) else self.tokens


class StepRecord(msgspec.Struct):
    """One step of one engine. Requests are named as in `Start`."""

    budget: int | None
    running: dict[str, int]  # output tokens of those that ran before the step
    decoding: list[str]  # those of them that needed one token more
    pieces: dict[str, Piece] = {}
    pulling: list[str] = []
    progress: list[tuple[str, int]] = []
    preempted: list[str] = []


class Record(msgspec.Struct):
    """All that a scenario leaves for its tests."""

    steps: list[StepRecord] = []
    arrivals: list[str] = []
    answers: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    finished: dict[str, str] = {}
    pulls: dict[str, bool] = {}
    refused: dict[str, bool] = {}  # whether that is the client's fault
    num_ended_leases: int = 0
    stats: dict[str, float] = {}
    num_blocks: int = 0
    notes: dict[str, int] = {}


class Stepped:
    """One engine, which is also its own peer: it can pull what it has prefilled."""

    def __init__(
        self,
        model_dir: str,
        num_blocks: int,
        prefill_order: Literal["fcfs", "srpt"] = "fcfs",
        **engine_args: Any,
    ) -> None:
        from tinfer.worker.engine import VllmEngine

        arguments = {
            # What a preempted request computes again it computes in other shapes; in float32 the
            # difference is far below what lies between two tokens of this model.
            "dtype": "float32",
            "block_size": BLOCK_TOKENS,
            "num_gpu_blocks_override": num_blocks,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": (num_blocks - 1) * BLOCK_TOKENS,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "enable_prefix_caching": False,
        }
        self.engine = VllmEngine(_spec(model_dir, arguments | engine_args, prefill_order))
        self.engine.add_peer(WORKER, 1, self.engine.ready().export)
        self.record = Record(num_blocks=self.engine.ready().num_blocks)
        self.sources: dict[str, Source] = {}
        # Preempted, and not told to go on; without `parks` they are at once.
        self.parks = False
        self.parked: list[str] = []
        self._budget: int | None = None
        self._watch()

    def _watch(self) -> None:
        """Note what every step consists of, as vLLM puts it together."""
        scheduler: Any = self.engine._scheduler
        schedule = scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            running = {_name(r.request_id): r.num_output_tokens for r in scheduler.running}
            decoding = [
                _name(r.request_id)
                for r in scheduler.running
                if r.num_output_tokens and r.num_tokens == r.num_computed_tokens + 1
            ]
            step = StepRecord(self._budget, running, decoding)
            scheduled = schedule(*args, **kwargs)
            for request_id, tokens in scheduled.num_scheduled_tokens.items():
                request = scheduler.requests[request_id]
                step.pieces[_name(request_id)] = Piece(
                    request.num_computed_tokens - tokens,
                    tokens,
                    request.num_prompt_tokens,
                    request.num_output_tokens,
                    bool(request.kv_transfer_params and "source" in request.kv_transfer_params),
                )
            step.pulling = [_name(r.request_id) for r in scheduler.kv_holding_waiting]
            self.record.steps.append(step)
            return scheduled

        scheduler.schedule = watched

    # --- what a scenario does -----------------------------------------------------------------

    def budget(self, tokens: int | None) -> None:
        self.engine.set_prefill_budget(tokens)
        self._budget = tokens

    def start(self, name: str, prompt: list[int], kind: Any = "whole", **sampling: Any) -> None:
        spec = SamplingSpec(**{"temperature": 0.0, "ignore_eos": True, **sampling})
        self.engine.start(Start(name, kind, array("i", prompt).tobytes(), spec))
        self.record.arrivals.append(name)

    def prefill(self, name: str, prompt: list[int]) -> Source:
        """Compute a prompt and hold its blocks."""
        self.start(name, prompt, "prefill", max_tokens=100)
        self.until(lambda: name in self.sources)
        return self.sources[name]

    def decode(self, name: str, prompt: list[int], source: Source, **sampling: Any) -> None:
        """Go on with a prompt that was prefilled, from its first token."""
        spec = SamplingSpec(**{"temperature": 0.0, "ignore_eos": True, **sampling})
        (first_token,) = self.record.answers[
            next(n for n, own in self.sources.items() if own.lease == source.lease)
        ]
        data = array("i", prompt).tobytes()
        self.engine.start(
            Start(name, "decode", data, spec, source, array("i", [first_token]).tobytes())
        )
        self.record.arrivals.append(name)

    def resume(self, source: Source | None = None) -> None:
        """Let what was preempted go on: one with those blocks, or all by computing theirs again."""
        for name in [self.parked.pop(0)] if source is not None else list(self.parked):
            self.engine.resume(name, source)
        if source is None:
            self.parked.clear()

    def step(self, num_steps: int = 1) -> None:
        """So many steps that compute or change anything."""
        for _ in range(num_steps):
            for _ in range(MAX_WAITS):
                if self._step():
                    break
                select.select([self.engine.wake_fd()], [], [], POLL_S)
                self.engine.clear_wake()
            else:
                raise AssertionError("nothing happens")

    def until(self, is_reached: Callable[[], bool]) -> None:
        for _ in range(MAX_STEPS):
            if is_reached():
                return
            self.step()
        raise AssertionError("not reached")

    def until_compiled(self) -> None:
        """Wait for all grammars, which threads compile: who starts when depends on them."""
        scheduler: Any = self.engine._scheduler
        guided = [r.structured_output_request for r in scheduler.requests.values()]
        for _ in range(MAX_WAITS):
            if all(one is None or one.grammar is not None for one in guided):
                return
            select.select([self.engine.wake_fd()], [], [], POLL_S)
        raise AssertionError("a grammar is not compiled")

    def has_unparked(self) -> bool:
        """Whether anything is here that goes on by itself."""
        return len(self.engine._running) > len(self.parked)

    def is_done_with(self, name: str) -> bool:
        """Whether that request has its answer, or was preempted (once more)."""
        return name in self.record.finished or name in self.parked

    def drain(self) -> None:
        self.until(lambda: not self.engine.has_requests())

    def note(self, name: str) -> None:
        """Remember how many steps there have been."""
        self.record.notes[name] = len(self.record.steps)

    # --- inside -------------------------------------------------------------------------------

    def _step(self) -> bool:
        num_before = len(self.record.steps)
        outputs = self.engine.step()
        progress, preempted = self.engine.take_report()
        if len(self.record.steps) > num_before:
            self.record.steps[-1].progress = progress
            self.record.steps[-1].preempted = preempted
        self.parked += preempted
        if not self.parks:
            self.resume()
        for output in outputs:
            self._see(output)
        for notice in self.engine.take_notices():
            if isinstance(notice, PullDone):
                self.record.pulls[notice.request_id] = notice.ok
            if isinstance(notice, Refused):
                self.record.refused[notice.request_id] = notice.client_fault
            if isinstance(notice, LeasesEnded):
                self.record.num_ended_leases += len(notice.leases)
        return not self.engine.was_idle_step() or not self.engine.has_requests()

    def _see(self, output: Output) -> None:
        name = output.request_id
        self.record.answers.setdefault(name, []).extend(output.token_ids)
        self.record.texts[name] = self.record.texts.get(name, "") + output.text
        if output.source is not None:
            self.sources[name] = output.source
        if output.finish_reason is not None:
            self.record.finished[name] = output.finish_reason

    def done(self) -> Record:
        self.record.stats = msgspec.structs.asdict(self.engine.stats())
        return self.record


def _name(internal_id: str) -> str:
    return internal_id.rpartition("-")[0]


def _spec(
    model_dir: str, engine_args: dict[str, Any], prefill_order: Literal["fcfs", "srpt"]
) -> WorkerSpec:
    return WorkerSpec(
        worker_id=WORKER,
        generation=1,
        engine="vllm",
        model_dir=model_dir,
        socket_path="",
        log_path="",
        kv_transport="shm",
        device="cpu",
        cpus=[],
        environment={},
        engine_args=engine_args,
        lease_ttl_s=600.0,
        prefill_order=prefill_order,
    )


def main(model_dir: str, out: str) -> None:
    from tests.e2e.engine_scenarios import SCENARIOS
    from tinfer.worker.preload import preload

    preload()
    left = list(SCENARIOS)
    running: dict[int, str] = {}
    while left or running:
        while left and len(running) < NUM_AT_ONCE:
            name = left.pop(0)
            running[_forked(SCENARIOS[name], model_dir, Path(out) / f"{name}.json")] = name
        pid, status = os.wait()
        if status:
            sys.exit(json.dumps({running[pid]: os.waitstatus_to_exitcode(status)}))
        del running[pid]


def _forked(scenario: Callable[[str], Record], model_dir: str, out: Path) -> int:
    """The process that runs one scenario."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out.write_bytes(msgspec.json.encode(scenario(model_dir)))
        code = 0
    except BaseException:  # noqa: BLE001  the parent tells by the exit code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
