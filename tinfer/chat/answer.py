"""One answer: how it came, and the figures that `/stats` shows of it."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from tinfer.client import AsyncStream, ChatChunk


class Answer(Struct):
    """One answer as far as it has come; `error` when it failed, `cut` when the user stopped it.

    `thoughts` are pieces as well: the reasoning that a server with a reasoning parser tells apart.
    `trace` is the server's own account, which only tinfer gives and only of a whole answer. The
    times are the client's, in seconds from the sending of the question.
    """

    question: str
    pieces: list[str] = msgspec.field(default_factory=list)
    finish_reason: str | None = None
    cut: bool = False
    error: str | None = None
    ttft_s: float | None = None
    e2el_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    trace: dict[str, Any] | None = None
    thoughts: list[str] = msgspec.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str | None:
        return "".join(self.thoughts) or None

    def see(self, stream: AsyncStream[ChatChunk]) -> None:
        """Take over what the stream knows so far."""
        self.finish_reason = stream.finish_reason
        self.ttft_s, self.e2el_s = stream.ttft_s, stream.e2el_s
        self.trace = stream.tinfer
        if stream.usage is not None:
            self.prompt_tokens = stream.usage.prompt_tokens
            self.output_tokens = stream.usage.completion_tokens

    def record(self) -> dict[str, Any]:
        """What the transcript keeps."""
        fields = msgspec.structs.asdict(self)
        del fields["pieces"], fields["thoughts"]
        said = {"question": fields.pop("question"), "answer": self.text}
        return {**said, **fields, "reasoning": self.reasoning}

    def figures(self) -> str:
        """A line per figure, for a person."""
        trace = self.trace or {}
        rows = [
            ("first token", self._first_token(trace)),
            ("output", self._output(trace)),
            ("prompt", self._prompt(trace)),
            ("route", self._route(trace)),
            ("hand-off", _handoff(trace)),
            ("total", _seconds(trace.get("e2el_s", self.e2el_s))),
            ("ended", self._ended()),
        ]
        return "\n".join(f"  {name:<12} {value}" for name, value in rows if value)

    def _first_token(self, trace: dict[str, Any]) -> str:
        told = _seconds(trace.get("ttft_s", self.ttft_s))
        if trace.get("queue_s") is None or trace.get("prefill_s") is None:
            return f"after {told}" if told else ""
        parts = f"queue {_seconds(trace['queue_s'])}, prefill {_seconds(trace['prefill_s'])}"
        return f"after {told} ({parts})"

    def _output(self, trace: dict[str, Any]) -> str:
        count = trace.get("output_tokens", self.output_tokens)
        if count is None:
            return ""
        decode_s = trace.get("decode_s")
        if decode_s is None and self.ttft_s is not None and self.e2el_s is not None:
            decode_s = self.e2el_s - self.ttft_s
        rate = f", {(count - 1) / decode_s:.1f} tokens/s" if decode_s and count > 1 else ""
        return f"{_count(count)}{rate}"

    def _prompt(self, trace: dict[str, Any]) -> str:
        count = trace.get("prompt_tokens", self.prompt_tokens)
        if count is None:
            return ""
        cached = trace.get("cached_tokens")
        return _count(count) + (f", {cached} of them from the cache" if cached else "")

    def _route(self, trace: dict[str, Any]) -> str:
        if not trace.get("route"):
            return "unknown: " + ("the answer was cut" if self.cut else "the server does not say")
        first, second = trace.get("prefill_worker"), trace.get("decode_worker")
        if second is None:
            return f"{trace['route']}: {first}, no decode"
        return f"{trace['route']}: {first}" + (f" -> {second}" if second != first else "")

    def _ended(self) -> str:
        if self.error is not None:
            return f"with an error: {self.error}"
        return "cut by Ctrl-C" if self.cut else self.finish_reason or ""


def _handoff(trace: dict[str, Any]) -> str:
    if trace.get("recomputed"):
        return "failed; the decode worker computed the prompt again"
    if trace.get("handoff_s") is None:
        return ""
    size = trace.get("handoff_bytes")
    copied = f" ({_bytes(size)}, copied in {_seconds(trace.get('copy_s'))})" if size else ""
    return _seconds(trace["handoff_s"]) + copied


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{seconds * 1000:.1f} ms"


def _bytes(num_bytes: int) -> str:
    unit, size = ("MiB", 2**20) if num_bytes >= 2**20 else ("KiB", 2**10)
    return f"{num_bytes / size:.1f} {unit}"


def _count(num_tokens: int) -> str:
    return f"{num_tokens} token" + ("" if num_tokens == 1 else "s")
