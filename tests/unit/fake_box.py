"""Two fake engines in one process that hand off to each other, and the clients they serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from tinfer.core.sampling import SamplingSpec, TokenLogprobs
from tinfer.wire.control import WorkerSpec
from tinfer.wire.messages import Output, Source, Start
from tinfer.worker.adapter import Engine, Notice, Report
from tinfer.worker.fake_engine import FakeEngine
from tinfer.worker.fake_kv import FakeBlocks, FakeExport
from tinfer.worker.fake_model import DIGEST_BYTES, expected_answer, prompt_bytes
from tinfer.worker.fake_settings import FakeSettings, settings_of
from tinfer.worker.kv.shm import attach_mmap

Kind = Literal["whole", "prefill", "decode"]
TINY = {"num_blocks": 24, "block_tokens": 4, "mean_output_tokens": 12}
ROOMY = {"num_blocks": 512, "block_tokens": 4, "mean_output_tokens": 12}


def spec_of(
    fake: Mapping[str, float],
    worker_id: str = "p",
    generation: int = 0,
    ttl_s: float = 60.0,
    chunk: int = 16,
) -> WorkerSpec:
    """A worker of the fake engine."""
    return WorkerSpec(
        worker_id=worker_id,
        generation=generation,
        engine="fake",
        model_dir="",
        socket_path="",
        log_path="",
        kv_transport="auto",
        device="cpu",
        cpus=[],
        environment={},
        engine_args={"max_num_seqs": 8, "max_num_batched_tokens": chunk},
        lease_ttl_s=ttl_s,
        fake=dict(fake),
    )


class Client:
    """What one request's client has seen, put together by counts as the master does it."""

    def __init__(self, prompt: list[int], sampling: SamplingSpec) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.end: tuple[str, int | str | None] | None = None
        self.source: Source | None = None
        self.cached: list[int] = []

    def see(self, output: Output) -> None:
        num_new = output.num_output_tokens - len(self.token_ids)
        len_new = output.text_len - len(self.text)
        if num_new > 0:
            self.token_ids += output.token_ids[-num_new:]
            self.logprobs += (output.logprobs or [])[-num_new:]
        if len_new > 0:
            self.text += output.text[-len_new:]
        if output.cached_tokens is not None:
            self.cached.append(output.cached_tokens)
        if output.finish_reason is not None:
            assert self.end is None, "a request ends once"
            self.end = (output.finish_reason, output.stop_reason)

    @property
    def answer(self) -> tuple[list[int], str, str, int | str | None]:
        assert self.end is not None, "the request is not over"
        return self.token_ids, self.text, *self.end


class Box:
    """A prefill and a decode worker that know each other, and their clients."""

    def __init__(self, ttl_s: float = 60.0, chunk: int = 16, **fake: float) -> None:
        self.p = FakeEngine(spec_of(fake, "p", 0, ttl_s, chunk))
        self.d = FakeEngine(spec_of(fake, "d", 3, ttl_s, chunk))
        self.settings: FakeSettings = settings_of(spec_of(fake))
        self.clients: dict[str, Client] = {}
        self.finished: list[str] = []
        self.notices: list[Notice] = []
        self.report = Report([], [])
        # How the next one that is preempted goes on: where it is, with what the other worker
        # computes again (under a name of its own), or not before the test says so.
        self.goes_on: Callable[[], Literal["here", "helped", "later"]] = lambda: "here"
        self.helped: dict[str, str] = {}
        self.num_helped = 0
        self.d.add_peer("p", 0, self.p.ready().export)
        # A type check that the engine answers to the worker's loop.
        self.engines: list[Engine] = [self.p, self.d]

    def start(self, request_id: str, kind: Kind, prompt: list[int], sampling: SamplingSpec) -> None:
        self.clients[request_id] = Client(prompt, sampling)
        engine = self.p if kind == "prefill" else self.d
        engine.start(Start(request_id, kind, prompt_bytes(prompt), sampling))

    def decode(self, request_id: str, source: Source | None = None) -> None:
        client = self.clients[request_id]
        self.d.start(
            Start(
                request_id,
                "decode",
                prompt_bytes(client.prompt),
                client.sampling,
                source=source or client.source,
                forced_tokens=prompt_bytes(client.token_ids[:1]),
                cached_tokens=5,
            )
        )

    def prefill(self, request_id: str = "r", **sampling: Any) -> Client:
        """A request that is prefilled and whose blocks are held."""
        spec = SamplingSpec(**{"max_tokens": 12, "ignore_eos": True, **sampling})
        self.start(request_id, "prefill", list(range(3, 13)), spec)
        client = self.clients[request_id]
        while client.source is None and client.end is None:
            self.step(self.p)
        return client

    def step(self, engine: Engine, handoff: bool = False) -> None:
        outputs = engine.step()
        self.report = engine.take_report()
        for output in outputs:
            if output.request_id in self.helped:
                self.d.resume(self.helped.pop(output.request_id), output.source)
                continue
            client = self.clients.get(output.request_id)
            if client is None:
                assert output.source is None, "an aborted prefill holds nothing"
                continue
            client.see(output)
            if client.end is not None:
                self.finished.append(output.request_id)
            if output.source is not None and client.end is not None:
                self.p.release_lease(output.source.lease)
            elif output.source is not None:
                client.source = output.source
                if handoff:
                    self.decode(output.request_id)
        self.notices += engine.take_notices()
        for request_id in self.report.preempted:
            self._preempted(engine, request_id)

    def _preempted(self, engine: Engine, request_id: str) -> None:
        how = self.goes_on()
        if engine is self.p or request_id not in self.clients or how == "here":
            engine.resume(request_id, None)
        elif how == "helped":
            self.num_helped += 1
            name = f"{request_id}+{self.num_helped}"
            self.helped[name] = request_id
            self.reprefill(name, self.clients[request_id])

    def reprefill(self, name: str, client: Client) -> None:
        """Compute on the prefill worker all that a request has."""
        prompt = prompt_bytes(client.prompt + client.token_ids)
        sampling = SamplingSpec(max_tokens=1, temperature=0.0, ignore_eos=True)
        self.p.start(Start(name, "prefill", prompt, sampling))

    def spoil(self, source: Source) -> None:
        """Overwrite the second block that a source offers, as a stray writer would."""
        export = msgspec.msgpack.decode(self.p.ready().export, type=FakeExport)
        block = msgspec.msgpack.decode(source.blocks, type=FakeBlocks).blocks[1]
        memory = attach_mmap(export.kv, writable=True)
        memory[block * DIGEST_BYTES] ^= 1
        memory.close()

    def drain(self, handoff: bool = False) -> None:
        """Step until nothing is left to do."""
        for _ in range(10_000):
            busy = [engine for engine in self.engines if engine.has_requests()]
            if not busy:
                return
            for engine in busy:
                self.step(engine, handoff)
        raise AssertionError("the engines do not come to an end")

    def seen(self, kind: type[Any]) -> list[Any]:
        return [notice for notice in self.notices if isinstance(notice, kind)]

    def expected(self, client: Client) -> tuple[list[int], str, str, int | str | None]:
        return expected_answer(client.prompt, client.sampling, self.settings)

    def assert_zero(self) -> None:
        for engine in self.engines:
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert (stats.num_used_blocks, stats.num_open_leases) == (0, 0)


@contextmanager
def boxed(ttl_s: float = 60.0, chunk: int = 16, **fake: float) -> Iterator[Box]:
    box = Box(ttl_s, chunk, **fake)
    try:
        yield box
    finally:
        box.p.close()
        box.d.close()
