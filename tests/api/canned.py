"""A model directory with a byte tokenizer, and a `Service` that says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tinfer.api.service import Delta, Generation, ModelCard, Sink, Stream
from tinfer.core.sampling import TokenLogprobs
from tinfer.core.types import Role
from tinfer.errors import InvalidRequest, RequestNotFound, TinferError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if shout is defined %}{{ shout }}{% endif %}"
)
BOS = 256
VOCAB_SIZE = 258


def write_model_dir(path: Path, template: str | None = TEMPLATE) -> Path:
    """One token per byte, BOS in front of plain prompts, ids 256 and 257 special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def token(text: str, logprob: float = -0.5, top: int = 0, token_id: int | None = None) -> Any:
    """Logprobs of one sampled token, ranked second, with `top` others above and below it."""
    others = [(1000 + i, -0.1 - i, i + 1, f"t{i}") for i in range(top)]
    first = (ord(text[0]) if token_id is None else token_id, logprob, 2, text)
    rows = [first, *others]
    return TokenLogprobs(*(list(column) for column in zip(*rows, strict=True)))


def say(*pieces: str, reason: str = "stop", **last: Any) -> list[Delta | BaseException]:
    """One delta per piece, one token per character; the last carries the reason."""
    deltas: list[Delta | BaseException] = [
        Delta(text=p, token_ids=[ord(c) for c in p]) for p in pieces
    ]
    deltas[-1] = Delta(
        text=pieces[-1],
        token_ids=[ord(c) for c in pieces[-1]],
        finish_reason=reason,  # type: ignore[arg-type]
        **last,
    )
    return deltas


class CannedStream:
    """Yields a script; an exception in it is raised, and at an `asyncio.Event` it waits."""

    def __init__(self, request_id: str, script: list[Any]) -> None:
        self.request_id = request_id
        self._script = script
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.finished = False
        self._sink: Sink | None = None
        self.num_written_through = 0

    def write_through(self, sink: Sink) -> None:
        self._sink = sink

    async def __aiter__(self) -> AsyncIterator[Delta]:
        self.started.set()
        for item in self._script:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
            elif item.finish_reason is None and self._sink is not None and self._sink(item):
                self.num_written_through += 1
            else:
                yield item
        self.finished = True

    def cancel(self) -> None:
        self.cancelled.set()


class CannedService:
    """Answers every sequence with `script(index)`; an error in place of a script refuses it."""

    def __init__(self, max_model_len: int = 100) -> None:
        self.model = ModelCard(("tiny", "org/tiny"), "/models/tiny", max_model_len, VOCAB_SIZE, 7)
        self.script: Callable[[int], list[Any] | TinferError] = lambda index: say("Hel", "lo")
        self.generations: list[Generation] = []
        self.streams: list[CannedStream] = []
        self._arrivals: asyncio.Queue[CannedStream] = asyncio.Queue()
        self.health = (True, "ok")
        self.left: list[tuple[str, float]] = []
        self.traced: list[tuple[float, str | None]] = []
        self.registry = CollectorRegistry()
        self.count = Counter("canned", "What a test counts.", ["way"], registry=self.registry)
        Gauge("canned_state", "Another family.", registry=self.registry).set(2)

    def submit(self, generation: Generation) -> Stream:
        index = len(self.streams)
        script = self.script(index)
        if isinstance(script, TinferError):
            raise script
        self.generations.append(generation)
        stream = CannedStream(f"r{index}", script)
        self.streams.append(stream)
        self._arrivals.put_nowait(stream)
        return stream

    async def started(self, count: int) -> list[CannedStream]:
        """The next `count` streams, once each of them is being read."""
        streams = [await self._arrivals.get() for _ in range(count)]
        for stream in streams:
            await stream.started.wait()
        return streams

    def healthy(self) -> tuple[bool, str]:
        return self.health

    def ledger(self) -> dict[str, Any]:
        return {"open_requests": 0}

    def state(self) -> dict[str, Any]:
        return {"workers": []}

    def trace(self, seconds: float, request_id: str | None) -> Iterator[list[dict[str, Any]]]:
        """Two batches, one of which is empty; there is a request `mine`."""
        if request_id not in (None, "mine"):
            raise RequestNotFound(f"no request {request_id!r} is kept", param="request_id")
        self.traced.append((seconds, request_id))
        event = {"ph": "i", "name": "one", "pid": 1, "tid": 0, "ts": 5}
        return iter([[], [event, event]])

    def ask_role(self, worker_id: str, role: Role) -> None:
        """There is one worker of each role, so none can change."""
        if worker_id not in ("prefill-0", "decode-0"):
            raise InvalidRequest(f"there is no worker {worker_id!r}", param="worker")
        raise InvalidRequest(f"it is the only one that is no {role.value} worker", param="role")

    def drain(self, worker_id: str, timeout_s: float) -> None:
        """Takes any worker of one name."""
        if worker_id != "decode-0":
            raise InvalidRequest(f"there is no worker {worker_id!r}", param="worker")
        self.left.append((worker_id, timeout_s))

    restart = drain

    def all_released(self) -> bool:
        """Every stream was read to its end or cancelled."""
        return all(s.finished or s.cancelled.is_set() for s in self.streams)

    async def forget(self) -> None:
        """Keep nothing of what was asked so far, once every stream of it has been let go."""
        for stream in self.streams:
            await stream.cancelled.wait()
        self.generations.clear()
        self.streams.clear()
        self._arrivals = asyncio.Queue()
