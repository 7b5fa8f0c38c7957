"""What a run of a batch came to: the object of `--json`, and its lines on standard output."""

from __future__ import annotations

from msgspec import Struct

from tinfer.batch.requests import Survey
from tinfer.client import Usage


class Summary(Struct, kw_only=True):
    """Counts of requests are over all lines of the input, tokens and time of this run alone.

    Every request is answered, failed or open: `num_requests` is their sum. `num_skipped` of them
    had their result before this run, answered or failed. Tokens are those of `usage` in the
    answers; rates are per second of `duration_s`, from the first request to the last result, and 0
    where there was none.
    """

    num_requests: int
    num_answered: int
    num_failed: int
    num_open: int
    num_skipped: int
    interrupted: bool
    duration_s: float
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_per_s: float
    completion_tokens_per_s: float


class Tally:
    """Counts results as they come."""

    def __init__(self) -> None:
        self.num_answered = 0
        self.num_failed = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def count(self, is_answer: bool, usage: Usage | None) -> None:
        self.num_answered += is_answer
        self.num_failed += not is_answer
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens
            self.completion_tokens += usage.completion_tokens or 0


def summary_of(counts: Survey, tally: Tally, duration_s: float, interrupted: bool) -> Summary:
    """Of the lines as they were found, and of what this run has made of them."""
    num_answered = tally.num_answered + counts.num_skipped - counts.num_skipped_failed
    num_failed = tally.num_failed + counts.num_skipped_failed
    return Summary(
        num_requests=counts.num_requests,
        num_answered=num_answered,
        num_failed=num_failed,
        num_open=counts.num_requests - num_answered - num_failed,
        num_skipped=counts.num_skipped,
        interrupted=interrupted,
        duration_s=duration_s,
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        prompt_tokens_per_s=_rate(tally.prompt_tokens, duration_s),
        completion_tokens_per_s=_rate(tally.completion_tokens, duration_s),
    )


def _rate(number: int, duration_s: float) -> float:
    return number / duration_s if duration_s > 0 else 0.0


def text_of(summary: Summary) -> str:
    """Two lines for a person."""
    counts = [f"{summary.num_answered} of {summary.num_requests} requests are answered"]
    for number, words in (
        (summary.num_failed, "failed"),
        (summary.num_open, "open"),
        (summary.num_skipped, "from an earlier run"),
    ):
        if number:
            counts.append(f"{number} {words}")
    return (
        ", ".join(counts)
        + f"\n{summary.duration_s:.1f} s: {summary.prompt_tokens} prompt tokens"
        + f" ({summary.prompt_tokens_per_s:.1f}/s), {summary.completion_tokens} completion tokens"
        + f" ({summary.completion_tokens_per_s:.1f}/s)\n"
    )
