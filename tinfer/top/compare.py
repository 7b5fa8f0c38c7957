"""From two scrapes of a server to what is shown of it."""

from __future__ import annotations

from tinfer.top.change import Change
from tinfer.top.scrape import Accounts, Metrics, Scrape, State, WorkerState
from tinfer.top.view import Handoffs, Lengths, Requests, Timing, View, WorkerView

# When the master's process was started, in Unix time: another one is another server.
_STARTED = "process_start_time_seconds"
_ANSWERED = ("stop", "length")


class _Interval:
    """What has changed, and in how many seconds: None where there is no earlier scrape."""

    def __init__(self, before: Scrape | None, now: Scrape) -> None:
        self.elapsed_s = None if before is None else now.at_s - before.at_s
        self.was_restarted = before is not None and (
            before.metrics.total(_STARTED) != now.metrics.total(_STARTED)
        )
        # Nothing has changed yet; and of a new server all was counted since the one before.
        earlier = now if before is None else before
        self.change = Change(None if self.was_restarted else earlier.metrics, now.metrics)

    def rate(self, name: str, **labels: str) -> float | None:
        """By how much a counter has grown per second."""
        return self.per_s(self.change.of(name, **labels))

    def per_s(self, number: float) -> float | None:
        return number / self.elapsed_s if self.elapsed_s else None

    def timing(self, name: str) -> Timing:
        return self.change.buckets(name).timing()


def view_of(url: str, before: Scrape | None, now: Scrape, num_waiting: int) -> View:
    """What is shown of `now`, with the change since `before`; of the requests that wait, the first
    `num_waiting`."""
    interval, metrics, state = _Interval(before, now), now.metrics, now.state
    started_s = metrics.total(_STARTED)
    return View(
        url=url,
        model=metrics.label("tinfer:build_info", "model_name"),
        version=metrics.label("tinfer:build_info", "version"),
        unix_s=now.unix_s,
        interval_s=interval.elapsed_s,
        uptime_s=None if started_s is None else max(0.0, now.unix_s - started_s),
        was_restarted=interval.was_restarted,
        is_healthy=bool(metrics.total("tinfer:healthy")),
        status=state.status,
        requests=_requests(interval, metrics),
        output_tokens_per_s=interval.rate("vllm:generation_tokens_total"),
        prompt_tokens_per_s=interval.rate("vllm:prompt_tokens_total"),
        ttft=interval.timing("vllm:time_to_first_token_seconds"),
        itl=interval.timing("vllm:inter_token_latency_seconds"),
        e2el=interval.timing("vllm:e2e_request_latency_seconds"),
        loop_lag=interval.timing("tinfer:loop_lag_seconds"),
        workers=[_worker(interval, metrics, worker) for worker in state.workers],
        requests_by_phase=state.requests_by_phase,
        num_waiting=_num_waiting(state),
        waiting=state.waiting[:num_waiting],
        handoffs=_handoffs(interval, metrics, now.accounts),
        lengths=_lengths(interval.change),
        lengths_so_far=_lengths(Change(None, metrics)),
    )


def _num_waiting(state: State) -> int:
    """All that are queued, of which the state names only the first, and the others that it names:
    a hand-off that is being copied waits for nobody."""
    others = sum(waiting.phase != "queued" for waiting in state.waiting)
    return state.requests_by_phase.get("queued", 0) + others


def _requests(interval: _Interval, metrics: Metrics) -> Requests:
    ends = metrics.by("vllm:request_success_total", "finished_reason")
    answered = sum(
        interval.change.of("vllm:request_success_total", finished_reason=end) for end in _ANSWERED
    )
    refused = _counts(metrics, "tinfer:requests_refused_total", "reason")
    failed = _counts(metrics, "tinfer:requests_failed_total", "reason")
    return Requests(
        accepted_per_s=interval.rate("tinfer:requests_accepted_total"),
        answered_per_s=interval.per_s(answered),
        num_accepted=int(metrics.total("tinfer:requests_accepted_total") or 0),
        num_answered=int(sum(ends.get(end, 0) for end in _ANSWERED)),
        num_aborted=int(ends.get("abort", 0)),
        num_refused=sum(refused.values()),
        num_failed=sum(failed.values()),
        refused=refused,
        failed=failed,
    )


def _worker(interval: _Interval, metrics: Metrics, worker: WorkerState) -> WorkerView:
    name = worker.id

    def read(metric: str, **labels: str) -> int:
        return int(metrics.total(f"tinfer:worker_{metric}", worker=name, **labels) or 0)

    outstanding = metrics.total("tinfer:worker_outstanding_prefill_tokens", worker=name)
    kv_bytes, kv_used_bytes = read("kv_bytes"), read("kv_used_bytes")
    busy = interval.rate("tinfer:worker_busy_seconds_total", worker=name)
    return WorkerView(
        id=name,
        role=worker.role,
        state=_state(worker),
        reason=worker.reason,
        generation=worker.generation,
        device=worker.device,
        num_running=read("requests", state="running"),
        num_waiting=read("requests", state="waiting"),
        kv_bytes=kv_bytes or None,
        kv_used_bytes=kv_used_bytes if kv_bytes else None,
        kv_share=min(1.0, kv_used_bytes / kv_bytes) if kv_bytes else None,
        outstanding_prefill_tokens=None if outstanding is None else int(outstanding),
        # A long step is told at its end, so an interval may hold more than its own seconds.
        busy_share=None if busy is None else min(1.0, busy),
        num_preemptions=read("preemptions_total"),
        num_deaths=read("deaths_total"),
        num_restarts=read("restarts_total"),
    )


def _state(worker: WorkerState) -> str:
    """As the server says it, but for a start that is not the first."""
    is_again = worker.state == "starting" and worker.generation > 1
    return "restarting" if is_again else worker.state


def _handoffs(interval: _Interval, metrics: Metrics, accounts: Accounts) -> Handoffs:
    return Handoffs(
        per_s=interval.rate("tinfer:handoffs_total"),
        bytes_per_s=interval.rate("tinfer:handoff_bytes_total"),
        mean_copy_s=interval.change.buckets("tinfer:handoff_copy_seconds").mean,
        num_recomputed=int(metrics.total("tinfer:handoffs_total", outcome="recomputed") or 0),
        leases=_counts(metrics, "tinfer:leases", "state"),
        num_pulls=accounts.pulls,
        num_zombies=accounts.zombies,
    )


def _lengths(change: Change) -> Lengths:
    num = change.of("tinfer:length_predictions_total")
    within = change.of("tinfer:length_predictions_total", outcome="within")
    return Lengths(
        num=int(num),
        within_share=within / num if num else None,
        mean_error_tokens=change.buckets("tinfer:length_error_tokens").mean,
    )


def _counts(metrics: Metrics, name: str, label: str) -> dict[str, int]:
    return {value: int(number) for value, number in metrics.by(name, label).items()}
