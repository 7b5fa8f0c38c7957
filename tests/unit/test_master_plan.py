"""The plan as a whole: decided from a model's files and a described machine, printed and written.

The GPUs are descriptions: none of this has run on one here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.gpu_box import GIB, FakeNvml, gpu, gpus
from tests.unit.model_box import SMALL, write_model
from tinfer.config import load
from tinfer.core.types import Role
from tinfer.errors import StartError
from tinfer.master import hub
from tinfer.master import model as model_module
from tinfer.master import plan as module
from tinfer.master.cores import CoreClaims, UsableCores
from tinfer.master.gpus import Gpu
from tinfer.master.host_cpu import SLOW_HALVES
from tinfer.master.host_memory import HostMemory
from tinfer.master.hub import HubModel
from tinfer.master.model_files import Weights
from tinfer.master.plan import Decision, Plan, Surroundings, decide, text_of


@pytest.fixture
def claims(request: pytest.FixtureRequest) -> Iterator[CoreClaims]:
    claims = CoreClaims(UsableCores((0, 1, 2, 3), 4), prefix=f"tinfer-{request.node.name}-")
    yield claims
    claims.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", SMALL, 6 << 20)


class Box:
    """A machine on which things are decided."""

    def __init__(self, claims: CoreClaims, folder: Path) -> None:
        self.claims = claims
        self.folder = folder
        self.halves_are_slow = False

    def decide(self, on: list[Gpu] | None = None, **values: Any) -> Decision:
        memory = HostMemory(64 * GIB, 32 * GIB)
        config = load({"model": str(self.folder), **values})
        around = Surroundings(self.claims, on or [], memory, self.halves_are_slow)
        return decide(config, around)

    def plan(self, on: list[Gpu] | None = None, **values: Any) -> Plan:
        return self.decide(on, **values).plan


@pytest.fixture
def box(claims: CoreClaims, folder: Path) -> Box:
    return Box(claims, folder)


def test_a_users_model_on_cores(box: Box) -> None:
    decision = box.decide()
    plan = decision.plan
    assert (plan.model, plan.directory) == (str(box.folder), str(box.folder))
    assert (plan.dtype, plan.weights_bytes, plan.max_model_len) == ("bfloat16", 6 << 20, 2048)
    assert (plan.kv_bytes_per_token, plan.download_bytes) == (4096, 0)
    assert [(w.cores, w.threads, w.kv_bytes) for w in plan.workers] == [
        ((0, 1), 2, 256 << 20),
        ((2, 3), 2, 256 << 20),
    ]
    assert {w.kv_tokens for w in plan.workers} == {65536}
    assert [p.kv_bytes for p in decision.placements] == [256 << 20] * 2
    assert any("4 usable cores over 2 workers: 2 threads each" in r for r in plan.reasons)


def test_the_built_in_model_gets_one_thread(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "MODEL_DIR", box.folder)
    plan = box.plan(model=None)
    assert [(w.cores, w.threads) for w in plan.workers] == [((0,), 1), ((1,), 1)]


def test_threads_as_asked_for(box: Box) -> None:
    assert {w.threads for w in box.plan(cpu_threads=1).workers} == {1}


def test_the_fake_engine_takes_cores_and_no_memory_whatever_gpus_there_are(box: Box) -> None:
    decision = box.decide(engine="fake")
    assert {(w.device, w.threads, w.kv_bytes) for w in decision.plan.workers} == {("cpu", 1, None)}
    assert [p.kv_bytes for p in decision.placements] == [None, None]


@pytest.mark.parametrize(
    ("options", "is_said"),
    [({}, True), ({"dtype": "float32"}, False), ({"engine": "fake"}, False)],
)
def test_a_cpu_that_is_slow_in_16_bits(box: Box, options: dict[str, Any], is_said: bool) -> None:
    assert SLOW_HALVES not in box.plan(**options).reasons
    box.halves_are_slow = True
    assert (SLOW_HALVES in box.plan(**options).reasons) == is_said


def test_two_gpus(box: Box) -> None:
    decision = box.decide(gpus(2))
    assert [(w.role, w.gpus, w.memory_share) for w in decision.plan.workers] == [
        ("prefill", ("GPU-0000",), 0.9),
        ("decode", ("GPU-0001",), 0.9),
    ]
    # The engine measures by itself what the plan only estimates.
    assert [p.kv_bytes for p in decision.placements] == [None, None]
    assert all((w.kv_bytes or 0) > 69 * GIB for w in decision.plan.workers)
    assert decision.plan.transport.startswith("cuda-ipc if a probe")


def test_one_gpu_for_one_worker_and_for_two(box: Box) -> None:
    alone = box.decide(gpus(1))
    assert [p.role for p in alone.placements] == [Role.BOTH]
    assert alone.plan.transport == "none: there is one worker"
    shared = box.decide(gpus(1), prefill=1, decode=1)
    # Two that start together would each count the other's memory, so both are told.
    assert [p.kv_bytes for p in shared.placements] == [w.kv_bytes for w in shared.plan.workers]
    assert all(p.kv_bytes for p in shared.placements)


def test_a_gpu_without_bfloat16_computes_in_float16(box: Box) -> None:
    assert box.plan([gpu(0, capability=(7, 5))]).dtype == "float16"


def test_tensor_parallel_ranks_share_weights_and_kv(box: Box) -> None:
    plan = box.plan(gpus(4), tensor_parallel_size=2)
    assert plan.weights_bytes == 6 << 20
    assert {w.weights_bytes for w in plan.workers} == {3 << 20}
    assert "on each" in text_of(plan)


@pytest.mark.parametrize(
    ("values", "on", "words"),
    [
        ({"tensor_parallel_size": 3}, [], "--tensor-parallel-size 3: the model has 8 attention"),
        ({"max_model_len": 1 << 24}, [], "do not hold a request of 16777216 tokens"),
        ({"kv_transport": "cuda-ipc"}, [], "--kv-transport cuda-ipc: it moves GPU memory"),
        ({"kv_transport": "shm"}, gpus(2), "--kv-transport shm: it moves CPU memory"),
        ({"prefill": 3, "decode": 1}, gpus(2), "4 workers need 4 GPUs, 2 can be had"),
        ({"model": "/no/such"}, [], "no such model directory"),
    ],
)
def test_what_would_not_start_is_one_line(
    box: Box, values: dict[str, Any], on: list[Gpu], words: str
) -> None:
    with pytest.raises(StartError) as caught:
        box.plan(on, **values)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_model_of_the_hub(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    found = HubModel("o/m", None, str(box.folder), Weights({"": 8 << 20}), ["a"], {"a": 3 << 20})
    checked: list[HubModel] = []
    monkeypatch.setattr(hub, "look", lambda *_: found)
    monkeypatch.setattr(hub, "check_disk", checked.append)
    plan = box.plan(model="o/m")
    assert checked == [found]
    assert (plan.model, plan.download_bytes, plan.weights_bytes) == ("o/m", 3 << 20, 8 << 20)
    assert "download  3.1 MB from the hub" in text_of(plan)


def test_a_cached_copy_is_said(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    found = HubModel("o/m", None, str(box.folder), Weights({"": 1}), note="offline: cached copy")
    monkeypatch.setattr(hub, "look", lambda *_: found)
    assert "offline: cached copy" in box.plan(model="o/m").reasons


def test_the_plan_for_a_reader(box: Box) -> None:
    text = text_of(box.plan())
    assert text.splitlines()[:5] == [
        f"plan for {box.folder} in {box.folder}",
        "  model     bfloat16, 6 MiB of weights, up to 2048 tokens per request",
        "  workers   prefill-0  cores 0-1, 2 threads, 256 MiB KV cache (65536 tokens)",
        "            decode-0   cores 2-3, 2 threads, 256 MiB KV cache (65536 tokens)",
        "  hand-off  workers on CPU share memory",
    ]
    on_gpu = text_of(box.plan(gpus(1)))
    assert "both-0  GPU 0, 90% of the memory, about 7" in on_gpu
    assert "why       one worker does both phases on GPU 0" in on_gpu


@pytest.mark.parametrize("key", [field.name for field in msgspec.structs.fields(Plan)])
def test_every_key_of_the_json_is_documented(key: str) -> None:
    assert Plan.__doc__ is not None
    assert f"`{key}`" in Plan.__doc__


def test_the_json_reads_back_as_the_plan(box: Box) -> None:
    plan = box.plan(gpus(2))
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_looking_around_asks_nvml_unless_the_engine_is_fake(
    claims: CoreClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_device_files", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = FakeNvml({"uuid": "GPU-a"})
    assert [g.uuid for g in module.look_around(load({}), claims, nvml).gpus] == ["GPU-a"]
    assert module.look_around(load({"engine": "fake"}), claims, nvml).gpus == []


@pytest.mark.parametrize("name", ["prefill_devices", "decode_devices"])
def test_named_gpus_where_there_is_none(claims: CoreClaims, name: str) -> None:
    with pytest.raises(StartError, match="there is no GPU to be had"):
        module.look_around(load({name: "0", "engine": "fake"}), claims)
