"""How long a hand-off takes inside real vLLM workers, against memcpy of the same bytes.

Two worker processes on two cores, each a real vLLM engine whose block pool has served 10,000 random
allocations; this process plays the master. Per prompt, in turns:

  handoff  from the pull's start (the decode engine has its blocks) to `finished_recving`
  copy     the part of it that the puller's thread spends on the copy
  one      (a) memcpy of as many bytes in one piece
  pieces   (b) memcpy of as many pieces of one page, one C loop over even distances

    python benchmarks/handoff_engine.py --json handoff_engine.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import zmq

from tinfer.bench.compare.hardware import hardware_of
from tinfer.core.sampling import SamplingSpec
from tinfer.tiny_model import MODEL_DIR
from tinfer.wire.control import WorkerSpec
from tinfer.wire.links import Incarnation
from tinfer.wire.messages import (
    Output,
    PeerUp,
    PullDone,
    Ready,
    Start,
    Step,
    Stop,
    ToMaster,
    decode_to_master,
    encode,
)
from tinfer.worker.kv_bench.cache import NUM_ALLOCATIONS, fragmented

KV_BYTES = 1 << 30
MAX_MODEL_LEN = 8192
PROMPT_TOKENS = (128, 512, 1024, 4096)
# Page bytes = block tokens × KV heads × head size × 2 (K and V) × 2 (bfloat16).
PAGES = {
    "8 KiB": {"block_size": 32, "num_key_value_heads": 2, "head_dim": 32},
    "64 KiB": {"block_size": 128, "num_key_value_heads": 2, "head_dim": 64},
    "512 KiB": {"block_size": 128, "num_key_value_heads": 8, "head_dim": 128},
}
NUM_LAYERS = 8
PREFILL, DECODE = Incarnation("prefill-0", 1), Incarnation("decode-0", 1)


def make_model(folder: Path, shape: dict[str, int]) -> str:
    """A model directory of the wanted KV shape; its weights are vLLM's dummies."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / name)
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 8, "hidden_size": 256}
    config |= {name: value for name, value in shape.items() if name != "block_size"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def run_worker(
    worker: Incarnation, core: int, model: str, shape: dict[str, int], sock: str
) -> None:
    """In a forked child: one engine with a fragmented pool, in the product's own loop."""
    from tinfer.worker.engine import VllmEngine
    from tinfer.worker.loop import WorkerLoop

    os.sched_setaffinity(0, [core])
    spec = WorkerSpec(
        worker_id=worker.worker_id,
        generation=worker.generation,
        engine="vllm",
        model_dir=model,
        socket_path=sock,
        log_path="",
        kv_transport="shm",
        device="cpu",
        cpus=[core],
        environment={},
        engine_args={
            "kv_cache_memory_bytes": KV_BYTES,
            "block_size": shape["block_size"],
            "max_num_batched_tokens": 512,
            "enable_prefix_caching": False,
            "load_format": "dummy",
            "max_model_len": MAX_MODEL_LEN,
        },
        lease_ttl_s=60.0,
    )
    engine = VllmEngine(spec)
    fragment(engine, seed=core)
    context = zmq.Context(1)
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, worker.identity)
    socket.connect(f"ipc://{sock}")
    socket.send(encode(engine.ready()))
    WorkerLoop(engine, socket).run()


def fragment(engine: Any, seed: int) -> None:
    """Shuffle the engine's free list as 10,000 random allocations of 1..64 blocks leave it."""
    pool = engine._scheduler.kv_cache_manager.block_pool
    blocks = pool.get_new_blocks(pool.get_num_free_blocks())
    order = fragmented(len(blocks), random.Random(seed))
    pool.free_blocks([blocks[index] for index in order])


class Pair:
    """The two workers, and this process as their master."""

    def __init__(self, model: str, shape: dict[str, int], folder: Path) -> None:
        sock = str(folder / "workers.sock")
        cores = sorted(os.sched_getaffinity(0))
        self._pids = [
            _fork(worker, cores[i % len(cores)], model, shape, sock)
            for i, worker in enumerate((PREFILL, DECODE))
        ]
        self._context = zmq.Context(1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self._socket.bind(f"ipc://{sock}")
        ready: dict[bytes, Ready] = {}
        while len(ready) < 2:
            sender, message = self.receive()
            assert isinstance(message, Ready), message
            ready[sender] = message
        self.send(DECODE, PeerUp(*PREFILL, ready[PREFILL.identity].export))
        self._number = 0

    def send(self, to: Incarnation, message: Any) -> None:
        self._socket.send_multipart([to.identity, encode(message)])

    def receive(self) -> tuple[bytes, ToMaster]:
        identity, data = self._socket.recv_multipart()
        return identity, decode_to_master(data)

    def hand_off(self, prompt: list[int]) -> PullDone:
        """One request through both workers; returns what the reader reports of its pull."""
        self._number += 1
        request_id = f"r{self._number}"
        data = array("i", prompt).tobytes()
        sampling = SamplingSpec(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.send(PREFILL, Start(request_id, "prefill", data, sampling))
        first = self._next_output(lambda output: output.source is not None)
        self.send(
            DECODE,
            Start(
                request_id,
                "decode",
                data,
                sampling,
                source=first.source,
                first_token=first.token_ids[0],
            ),
        )
        done: PullDone | None = None
        while True:
            _, message = self.receive()
            if isinstance(message, PullDone):
                done = message
            ends = [one.finish_reason for one in getattr(message, "outputs", ())]
            if any(end is not None for end in ends):
                break
        assert done is not None and done.ok, done
        return done

    def _next_output(self, wanted: Any) -> Output:
        while True:
            _, message = self.receive()
            if isinstance(message, Step):
                for output in message.outputs:
                    if wanted(output):
                        return output

    def close(self) -> None:
        for worker in (PREFILL, DECODE):
            self.send(worker, Stop())
        for pid in self._pids:
            os.waitpid(pid, 0)
        self._socket.close(0)
        self._context.term()


def _fork(worker: Incarnation, core: int, model: str, shape: dict[str, int], sock: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    _child(worker, core, model, shape, sock)


def _child(
    worker: Incarnation, core: int, model: str, shape: dict[str, int], sock: str
) -> NoReturn:
    code = 1
    try:
        run_worker(worker, core, model, shape, sock)
        code = 0
    finally:
        os._exit(code)


class Memory:
    """Two resident buffers of the KV cache's size for the baselines."""

    def __init__(self) -> None:
        self.src, self.dst = (np.ones(KV_BYTES, np.int8) for _ in range(2))
        self._rng = random.Random(0)

    def one_s(self, num_bytes: int) -> float:
        at = self._rng.randrange(0, KV_BYTES - num_bytes, 4096)
        started = time.perf_counter()
        ctypes.memmove(self.dst.ctypes.data + at, self.src.ctypes.data + at, num_bytes)
        return time.perf_counter() - started

    def pieces_s(self, num_bytes: int, page_bytes: int) -> float:
        count = num_bytes // page_bytes
        first = self._rng.randrange(0, KV_BYTES // page_bytes - 2 * count + 1) * page_bytes
        views = [
            b[first : first + 2 * count * page_bytes].reshape(count, 2 * page_bytes)[:, :page_bytes]
            for b in (self.dst, self.src)
        ]
        started = time.perf_counter()
        views[0][...] = views[1]
        return time.perf_counter() - started


def measure(
    pair: Pair, memory: Memory, page_bytes: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Medians over `rounds` prompts of one length, hand-off and baselines in turns."""
    rng = random.Random(tokens)
    rows: dict[str, list[float]] = {"handoff": [], "copy": [], "one": [], "pieces": []}
    num_bytes = 0
    for number in range(rounds + 2):
        done = pair.hand_off([rng.randrange(256) for _ in range(tokens)])
        num_bytes = done.num_bytes
        one_s, pieces_s = memory.one_s(num_bytes), memory.pieces_s(num_bytes, page_bytes)
        if number >= 2:  # the first maps the peer and touches memory for the first time
            for name, value in zip(
                rows, (done.handoff_s, done.copy_s, one_s, pieces_s), strict=True
            ):
                rows[name].append(value)
    result: dict[str, Any] = {"prompt_tokens": tokens, "num_bytes": num_bytes}
    for name, values in rows.items():
        result[f"{name}_ms"] = round(statistics.median(values) * 1e3, 3)
    for base in ("one", "pieces"):
        for part in ("handoff", "copy"):
            ratios = [b / p for b, p in zip(rows[base], rows[part], strict=True)]
            result[f"{base}_over_{part}"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    from tinfer.worker.preload import preload

    preload()
    gc.freeze()
    results = []
    for name, shape in PAGES.items():
        page_bytes = shape["block_size"] * shape["num_key_value_heads"] * shape["head_dim"] * 4
        with tempfile.TemporaryDirectory(prefix="tinfer-bench-") as folder:
            pair = Pair(make_model(Path(folder), shape), shape, Path(folder))
            memory = Memory()
            for tokens in PROMPT_TOKENS:
                row = {"page": name, **measure(pair, memory, page_bytes, tokens, arguments.rounds)}
                print(json.dumps(row), flush=True)
                results.append(row)
            pair.close()
    report = {
        "benchmark": "handoff_engine",
        "command": f"python benchmarks/handoff_engine.py --rounds {arguments.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware_of(),
        "num_allocations": NUM_ALLOCATIONS,
        "num_layers": NUM_LAYERS,
        "rounds": arguments.rounds,
        "results": results,
    }
    if arguments.json:
        json.dump(report, arguments.json, indent=2)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # Read by the OpenMP runtime when torch was imported above; a worker has one thread.
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_NUM_THREADS": "1"}
        )
    main()
