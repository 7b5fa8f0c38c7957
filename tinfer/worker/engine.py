"""The vLLM engine as the worker's loop sees it: requests in, token outputs and notices out."""

from __future__ import annotations

import os
import time
from typing import Any, Literal, cast

import numpy as np
from msgspec import Struct
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer

from tinfer.wire.control import WorkerSpec
from tinfer.wire.messages import (
    Aborted,
    LeaseId,
    Output,
    Ready,
    Refused,
    Source,
    Start,
    WorkerStats,
)
from tinfer.worker.adapter import EngineRefusal, Notice, Report
from tinfer.worker.connector import TinferConnector
from tinfer.worker.engine_build import build_engine
from tinfer.worker.engine_scheduler import EngineScheduler
from tinfer.worker.grammar_watch import MAX_COMPILE_S
from tinfer.worker.handoff_scheduler import SchedulerSide
from tinfer.worker.kv_format import published_format
from tinfer.worker.ranks.executor import RankExecutor
from tinfer.worker.sampling import all_logprobs, sampling_params, token_logprobs
from tinfer.worker.wake import WakePipe

FinishReason = Literal["stop", "length", "abort", "error"]


class _Running(Struct):
    """What an engine's request has emitted so far, as the master will count it."""

    kind: Literal["whole", "prefill", "decode"]
    detokenizer: IncrementalDetokenizer
    num_output_tokens: int = 0
    text_len: int = 0


class VllmEngine:
    """One in-process vLLM engine. Every method is called from the thread that built it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._wake = WakePipe()
        self._llm = build_engine(spec, self._wake.path)
        core: Any = self._llm.engine_core
        scheduler = core.engine_core.scheduler
        assert isinstance(scheduler, EngineScheduler)
        self._scheduler = scheduler
        scheduler.set_prefill_order(spec.prefill_order)
        executor = core.engine_core.model_executor
        self._ranks = executor if isinstance(executor, RankExecutor) else None
        connector = scheduler.connector
        assert isinstance(connector, TinferConnector)
        self._connector = connector
        self._handoff: SchedulerSide = connector.scheduler_side
        self._running: dict[str, _Running] = {}
        self._aborted: list[str] = []
        self._refusals: list[Refused] = []
        self._num_steps = 0
        self._busy_s = 0.0
        self._emitted = False

    # --- what it is ---------------------------------------------------------------------------

    def ready(self) -> Ready:
        config = self._llm.vllm_config
        export, summary = self._handoff.export()
        return Ready(
            pid=os.getpid(),
            max_model_len=config.model_config.max_model_len,
            block_tokens=config.cache_config.block_size,
            # vLLM keeps one block of the pool for itself (the null block).
            num_blocks=self._pool().num_gpu_blocks - 1,
            kv_bytes=summary.kv_bytes,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            chunk_tokens=config.scheduler_config.max_num_batched_tokens,
            vocab_size=config.model_config.get_vocab_size(),
            transport=summary.transport,
            device=summary.device,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            engine="vllm",
            export=export,
            kv_format=published_format(export),
        )

    def wake_fd(self) -> int:
        return self._wake.fd

    def clear_wake(self) -> None:
        self._wake.clear()

    # --- requests -----------------------------------------------------------------------------

    def start(self, start: Start) -> None:
        source = start.source
        transfer: dict[str, Any] | None = None
        if start.kind == "prefill":
            transfer = {"do_remote_decode": True}
        elif source is not None:
            transfer = self._handoff.transfer_params(source)
        try:
            params = sampling_params(start, transfer)
            prompt = np.frombuffer(start.prompt, dtype="<i4").tolist()
            internal_id = self._llm.add_request(
                start.request_id, {"prompt_token_ids": prompt}, params
            )
        except (ValueError, TypeError, VLLMClientError) as error:
            self._refuse(source)
            raise EngineRefusal(str(error), client_fault=True) from error
        except Exception as error:  # noqa: BLE001  whatever else vLLM raises is a refusal too
            self._refuse(source)
            raise EngineRefusal(f"{type(error).__name__}: {error}", client_fault=False) from error
        state = self._llm.output_processor.request_states[internal_id]
        assert state.detokenizer is not None
        self._running[start.request_id] = _Running(start.kind, state.detokenizer)
        self._scheduler.set_reasoning(internal_id, start.sampling.structured)

    def _refuse(self, source: Source | None) -> None:
        if source is not None:
            self._handoff.mark_unused(source)

    def resume(self, request_id: str, source: Source | None) -> None:
        transfer = None if source is None else self._handoff.transfer_params(source)
        is_here = self._scheduler.resume(request_id, transfer)
        if source is not None and not is_here:
            self._handoff.mark_unused(source)

    def abort(self, request_ids: list[str]) -> None:
        known = [rid for rid in request_ids if self._running.pop(rid, None) is not None]
        self._llm.abort_request(known)
        self._aborted += known

    def has_requests(self) -> bool:
        self._check_ranks()  # the loop asks in each turn
        return bool(self._scheduler.has_requests())

    def was_idle_step(self) -> bool:
        return self._scheduler.num_scheduled_tokens == 0 and not self._emitted

    def step(self) -> list[Output]:
        started_s = time.monotonic()
        self._scheduler.num_scheduled_tokens = 0
        try:
            results = cast("list[RequestOutput]", self._llm.step())
        except RuntimeError:
            self._check_ranks()  # their death says more than what vLLM makes of it
            raise
        self._refuse_slow_grammars()
        outputs = [output for result in results if (output := self._output(result)) is not None]
        self._emitted = bool(outputs) or self._handoff.has_notices()
        if self._scheduler.num_scheduled_tokens:
            self._num_steps += 1
            self._busy_s += time.monotonic() - started_s
        return outputs

    def _refuse_slow_grammars(self) -> None:
        for request_id in self._scheduler.take_slow_grammars():
            if self._running.pop(request_id, None) is not None:
                self._llm.abort_request([request_id])
                message = f"its grammar takes longer than {MAX_COMPILE_S:g} s to compile"
                self._refusals.append(Refused(request_id, message, client_fault=True))

    def take_report(self) -> Report:
        return self._scheduler.take_report()

    def set_prefill_budget(self, tokens: int | None) -> None:
        self._scheduler.set_prefill_budget(tokens)

    def _check_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.check()

    def _output(self, result: RequestOutput) -> Output | None:
        running = self._running.get(result.request_id)
        if running is None:
            return None
        completion = result.outputs[0]
        source = self._handoff.source_of(result.kv_transfer_params)
        finish = cast("FinishReason | None", completion.finish_reason)
        text = completion.text
        if source is not None and finish != "stop":
            finish, text = None, _unfinished_text(running.detokenizer)
        elif source is None and running.kind == "prefill" and finish == "length":
            finish = "error"  # the blocks were not held, so nothing can go on from them
        if finish is not None or source is not None:
            del self._running[result.request_id]
        return self._count(running, result, completion, finish, text, source)

    def _count(
        self,
        running: _Running,
        result: RequestOutput,
        completion: CompletionOutput,
        finish: FinishReason | None,
        text: str,
        source: Source | None,
    ) -> Output:
        token_ids = list(completion.token_ids)
        first = running.num_output_tokens == 0
        running.num_output_tokens += len(token_ids)
        running.text_len += len(text)
        logprobs = completion.logprobs
        return Output(
            request_id=result.request_id,
            token_ids=token_ids,
            num_output_tokens=running.num_output_tokens,
            text=text,
            text_len=running.text_len,
            finish_reason=finish,
            stop_reason=completion.stop_reason if finish is not None else None,
            logprobs=None if logprobs is None else [token_logprobs(p) for p in logprobs],
            prompt_logprobs=all_logprobs(result.prompt_logprobs) if first else None,
            cached_tokens=result.num_cached_tokens if first else None,
            source=source,
        )

    # --- peers and leases ---------------------------------------------------------------------

    def add_peer(self, worker_id: str, generation: int, export: bytes) -> None:
        self._handoff.add_peer(worker_id, generation, export)

    def drop_peer(self, worker_id: str, generation: int) -> None:
        self._handoff.drop_peer(worker_id, generation)

    def release_lease(self, lease: LeaseId) -> None:
        self._handoff.release_lease(lease)

    def extend_lease(self, lease: LeaseId, extra_s: float) -> None:
        self._handoff.extend_lease(lease, extra_s)

    def take_notices(self) -> list[Notice]:
        notices = self._handoff.take_notices(self.stats)
        notices += self._refusals
        self._refusals = []
        if self._aborted:
            notices.append(Aborted(self._aborted))
            self._aborted = []
        return notices

    def stats(self) -> WorkerStats:
        pool = self._pool()
        num_free_blocks = pool.get_num_free_blocks()
        num_running, num_waiting = self._scheduler.get_request_counts()
        return WorkerStats(
            num_running=num_running,
            num_waiting=num_waiting,
            num_used_blocks=pool.num_gpu_blocks - 1 - num_free_blocks,
            num_free_blocks=num_free_blocks,
            num_steps=self._num_steps,
            busy_s=self._busy_s,
            **self._scheduler.counts,
            **self._handoff.counters(),
        )

    def _pool(self) -> Any:
        return self._scheduler.kv_cache_manager.block_pool

    def close(self) -> None:
        """Stop the copies and unmap the peers. The process ends after this, and its ranks with it;
        the kernel frees the rest faster than vLLM's own shutdown, which collects garbage and tears
        down groups."""
        if self._ranks is not None:
            self._ranks.close()
        self._connector.shutdown()
        if has_kv_transfer_group():
            connector: Any = get_kv_transfer_group()
            connector.shutdown()
        self._wake.close()


def _unfinished_text(detokenizer: IncrementalDetokenizer) -> str:
    """The text that a running request would have released: without the stop hold-back, which
    vLLM's final output of a one-token prefill flushes."""
    if not isinstance(detokenizer, BaseIncrementalDetokenizer):
        return ""
    held_back = detokenizer.stop_buffer_length
    text = detokenizer.output_text
    return text[:-held_back] if held_back else text
