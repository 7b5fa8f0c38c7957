"""vLLM's scheduler with a prefill budget, a victim by progress, and a report of what it did.

Stage two of two-level scheduling: the master decides which requests come here and how many prompt
tokens a step may compute, this class keeps to it from step to step. It leaves vLLM's algorithm
alone and answers three of its questions differently: how many tokens a request gets
(`_reserve_prefill_lookahead`; with `srpt` the shortest prompt is served first), whether a waiting
request may be looked at (`_handle_blocked_waiting_request`), and, by the order of `running`, who
runs last, which with vLLM's first-come policy is the victim of a preemption. Whoever was preempted
is parked until `resume`: the master may have its blocks computed elsewhere.

Invariant: a step computes at most `budget` tokens of prompts and of what preempted requests have to
compute again; a token of a sequence that decodes, or that ends a pull, is never one of them and
never waits for one.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tinfer.core.sampling import StructuredSpec
from tinfer.worker.adapter import Report
from tinfer.worker.grammar_watch import GrammarWatch
from tinfer.worker.handoff_scheduler import external_id

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class EngineScheduler(Scheduler):
    """Set as vLLM's `scheduler_cls`, for synchronous scheduling; used by the engine's thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._budget_tokens: int | None = None
        self._prefill_left_tokens = 0
        self._shortest_first = False
        # With the shortest first: what each unfinished prompt gets of this step.
        self._grants: dict[str, int] = {}
        # Free blocks and requests running when each was granted tokens and did not get in.
        self._turned_away: dict[str, tuple[int, int]] = {}
        self._progress: list[tuple[str, int]] = []
        self._preempted: list[str] = []
        # Preempted, and not told how to go on; they wait with vLLM's others, which are passed over.
        self._parked: dict[str, Request] = {}
        self.grammar_watch = GrammarWatch()
        self._slow_grammars: list[str] = []
        # Of the last step; for the caller to reset, since an engine without requests runs none.
        self.num_scheduled_tokens = 0
        self.counts = dict.fromkeys(
            ("num_computed_prompt_tokens", "num_recomputed_pulled_tokens", "num_preemptions"), 0
        )

    def set_prefill_budget(self, tokens: int | None) -> None:
        """Prompt tokens per step, 0 for none, from the next step on; None: as many as fit."""
        assert tokens is None or tokens >= 0, f"a prefill budget of {tokens} tokens"
        self._budget_tokens = tokens

    def set_prefill_order(self, order: Literal["fcfs", "srpt"]) -> None:
        """Prompts by their arrival, or the one with the fewest tokens left first: a short prompt
        that arrives beside a long one is computed in the next step."""
        self._shortest_first = order == "srpt"

    def resume(self, name: str, transfer: dict[str, Any] | None) -> bool:
        """Let a parked request go on, to pull what `transfer` says or (None) to compute all that it
        had. Says whether there is one of that external id."""
        request = self._parked.pop(name, None)
        if request is None:
            return False
        if transfer is not None:
            request.kv_transfer_params = transfer
        return True

    def set_reasoning(self, internal_id: str, spec: StructuredSpec | None) -> None:
        """Tell a request that has just been added from where on its grammar holds; vLLM's
        `add_request` of the in-process engine does not take it."""
        structured = self.requests[internal_id].structured_output_request
        if spec is None or structured is None:
            return
        structured.reasoning_ended = spec.reasoning_ended
        if spec.template_kwargs is not None:
            kwargs = msgspec.json.decode(spec.template_kwargs)
            structured.reasoning_parser_kwargs = {"chat_template_kwargs": kwargs}

    def take_report(self) -> Report:
        """What happened since the last call that no output tells."""
        report = Report(self._progress, self._preempted)
        self._progress, self._preempted = [], []
        return report

    def take_slow_grammars(self) -> list[str]:
        """External ids of requests that wait for a grammar whose compilation takes too long."""
        slow, self._slow_grammars = self._slow_grammars, []
        return slow

    # --- vLLM's hooks -------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next step, as vLLM would have it, within the budget."""
        self.running.sort(key=_most_progressed_first)
        self._prefill_left_tokens = self._prefill_room_tokens()
        if self._shortest_first:
            self._grants = self._granted()
        scheduled = super().schedule(throttle_prefills)
        if self._shortest_first:
            self._note_turned_away()
        self._count(scheduled)
        return scheduled

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """How many tokens the request really gets. vLLM asks this of each request that it wants to
        put into a step, running or waiting, and passes over a running one that gets none."""
        num_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if _needs_one_token(request, num_computed_tokens):
            return num_tokens
        num_tokens = min(num_tokens, self._prefill_left_tokens)
        if self._shortest_first:
            num_tokens = min(num_tokens, self._grants.get(request.request_id, 0))
        self._prefill_left_tokens -= num_tokens
        return num_tokens

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be looked at in this step; the next one is if not.

        Without this a prompt that gets no tokens would end the search, and a pull behind it would
        wait for the budget. A prompt that lacks blocks does end it: blocks go by order of arrival.
        """
        if self._parked and external_id(request.request_id) in self._parked:
            return False
        if not super()._handle_blocked_waiting_request(request):
            self._watch_grammar(request)
            return False
        if _starts_pull(request) or _needs_one_token(request, request.num_computed_tokens):
            return True
        if self._shortest_first and not self._grants.get(request.request_id, 0):
            return False
        return self._prefill_left_tokens > 0

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.counts["num_preemptions"] += 1
        name = external_id(request.request_id)
        self._parked[name] = request
        self._preempted.append(name)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._parked.pop(external_id(request.request_id), None)
        return super()._free_request(request, *args, **kwargs)

    def _watch_grammar(self, request: Request) -> None:
        wanted = request.structured_output_request
        work = None if wanted is None else wanted._grammar
        if isinstance(work, Future) and self.grammar_watch.is_too_slow(work, time.monotonic()):
            self._slow_grammars.append(external_id(request.request_id))

    # --- inside -------------------------------------------------------------------------------

    def _prefill_room_tokens(self) -> int:
        """The budget, as far as a step has room for it beside what must not wait: one token for
        each sequence that decodes or has been pulled, and one so that vLLM, which stops at the end
        of its tokens, comes to the pulls that are to start."""
        running = sum(_needs_one_token(r, r.num_computed_tokens) for r in self.running)
        pulled = sum(self._is_pulled(request) for request in self.kv_holding_waiting)
        starting = any(_starts_pull(request) for request in self.waiting)
        room = max(0, self.max_num_scheduled_tokens - running - pulled - starting)
        return room if self._budget_tokens is None else min(room, self._budget_tokens)

    def _granted(self) -> dict[str, int]:
        """The step's prompt tokens by request, the one with the fewest left first.

        A waiting prompt that was granted tokens before and did not get in lacks blocks or a seat:
        until there are more of them nothing is kept for it that those that run could use. Two of
        those taking turns would starve one that runs, and has the blocks.
        """
        prompts = [r for r in self.running if not _needs_one_token(r, r.num_computed_tokens)]
        parked = self._parked.values()
        waiting = [r for r in self.waiting if not _starts_pull(r) and r not in parked]
        late = [r for r in waiting if self._is_turned_away(r.request_id)]
        prompts += [r for r in waiting if r not in late]
        prompts.sort(key=_left_tokens)
        left_tokens = self._prefill_left_tokens
        grants = {}
        for request in (*prompts, *sorted(late, key=_left_tokens)):
            num_tokens = min(left_tokens, request.num_tokens - request.num_computed_tokens)
            grants[request.request_id] = num_tokens
            left_tokens -= num_tokens
        return grants

    def _note_turned_away(self) -> None:
        room, before = self._room(), self._turned_away
        self._turned_away = {}
        for request in self.waiting:
            rid = request.request_id
            if self._grants.get(rid):
                self._turned_away[rid] = room
            elif rid in before:
                self._turned_away[rid] = before[rid]

    def _is_turned_away(self, request_id: str) -> bool:
        """Whether what it lacked when it was turned away is still not there."""
        then = self._turned_away.get(request_id)
        if then is None:
            return False
        num_free, num_running = self._room()
        return num_free <= then[0] and num_running >= then[1]

    def _room(self) -> tuple[int, int]:
        num_free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return num_free, len(self.running)

    def _is_pulled(self, request: Request) -> bool:
        return (
            request.status is not RequestStatus.WAITING_FOR_REMOTE_KVS
            or request.request_id in self.finished_recving_kv_req_ids
        )

    def _count(self, scheduled: SchedulerOutput) -> None:
        """Count what a step computes of prompts, what it computes again after a preemption among
        it, and of this what a pull should have spared: all but the last token of a prompt."""
        self.num_scheduled_tokens = scheduled.total_num_scheduled_tokens
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request = self.requests[request_id]
            if num_tokens == 1 and request.num_output_tokens and not request.is_prefill_chunk:
                continue  # it decodes
            self.counts["num_computed_prompt_tokens"] += num_tokens
            end = request.num_computed_tokens  # as of after the step
            if _has_source(request) and not request.num_preemptions:
                num_spared = min(end, request.num_prompt_tokens - 1) - (end - num_tokens)
                self.counts["num_recomputed_pulled_tokens"] += max(0, num_spared)
            if request.is_prefill_chunk:
                computed_tokens = min(end, request.num_prompt_tokens)
                self._progress.append((external_id(request_id), computed_tokens))


def _most_progressed_first(request: Request) -> tuple[int, float]:
    """By tokens of the answer, then by age: prompts come last, in order of their arrival."""
    return -request.num_output_tokens, request.arrival_time


def _left_tokens(request: Request) -> tuple[int, float]:
    return request.num_tokens - request.num_computed_tokens, request.arrival_time


def _needs_one_token(request: Request, num_computed_tokens: int) -> bool:
    """Whether it decodes, or has been pulled but for the last token of its prompt."""
    return request.num_tokens - num_computed_tokens == 1 and (
        request.num_output_tokens > 0 or _has_source(request)
    )


def _starts_pull(request: Request) -> bool:
    """Whether it waits for blocks to pull into, which costs a step nothing."""
    params = request.kv_transfer_params
    # A source without tokens could not be staged by its owner: that prompt is computed here, as is
    # one of which each token's logprobs were asked for, which vLLM never takes from elsewhere.
    if not params or request.skip_reading_prefix_cache:
        return False
    return bool(params.get("do_remote_prefill") and params["source"].num_tokens)


def _has_source(request: Request) -> bool:
    return "source" in (request.kv_transfer_params or ())
