"""What a start does before its first process; GPUs are a faked NVML, a download is made up."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.gpu_box import GIB, FakeNvml
from tests.unit.model_box import LLAMA_7B, SMALL, write_model
from tinfer.config import load
from tinfer.errors import StartError
from tinfer.master import hub, plan, preparation
from tinfer.master.cores import CoreClaims, UsableCores
from tinfer.master.hub import HubModel
from tinfer.master.model_files import Weights
from tinfer.master.plan import Plan, text_of
from tinfer.master.preparation import dry_run, prepare

LookAround = Callable[..., plan.Surroundings]


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put GPUs of so many GiB into this machine."""

    def put(*sizes_gib: int) -> None:
        devices = [{"uuid": f"GPU-{i}", "total": gib * GIB} for i, gib in enumerate(sizes_gib)]
        nvml = FakeNvml(*devices)
        real: LookAround = plan.look_around
        monkeypatch.setattr(plan, "look_around", lambda config, claims: real(config, claims, nvml))
        monkeypatch.setattr(plan, "check_device_files", lambda: None)
        monkeypatch.setattr(preparation, "check_gpus", lambda placements: None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


def dry(**values: Any) -> Plan:
    return dry_run(load({"port": 0, **values}))


def test_a_dry_run_of_the_built_in_model() -> None:
    found = dry(engine="fake")
    assert (found.model, [w.id for w in found.workers]) == (
        "tinfer-tiny",
        ["prefill-0", "decode-0"],
    )


def test_calls_need_a_parser() -> None:
    with pytest.raises(StartError, match="--enable-auto-tool-choice needs a --tool-call-parser"):
        dry(engine="fake", enable_auto_tool_choice=True)
    # As in vLLM, a parser alone changes nothing.
    assert dry(engine="fake", tool_call_parser="hermes") == dry(engine="fake")


def test_weights_too_large_for_one_gpu(tmp_path: Path, on_gpus: Callable[..., None]) -> None:
    on_gpus(*[24] * 8)
    folder = write_model(tmp_path, LLAMA_7B, 60 * GIB)
    with pytest.raises(StartError, match=r"does not fit.*--tensor-parallel-size 4 fits"):
        dry(model=str(folder))
    found = dry(model=str(folder), tensor_parallel_size=4)
    assert [w.label for w in found.workers] == ["GPU 0+1+2+3", "GPU 4+5+6+7"]


def test_a_port_in_use_ends_a_dry_run_too() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartError, match="is in use"):
            dry(engine="fake", port=taken.getsockname()[1])


@pytest.fixture
def cores(request: pytest.FixtureRequest) -> CoreClaims:
    claims = CoreClaims(UsableCores((0, 1), 2), prefix=f"tinfer-{request.node.name}-")
    request.addfinalizer(claims.close)
    return claims


def test_the_plan_is_said_before_anything_starts(
    cores: CoreClaims, capsys: pytest.CaptureFixture[str]
) -> None:
    _, decision = prepare(load({"engine": "fake"}), cores)
    out, err = capsys.readouterr()
    assert (out, err) == ("", text_of(decision.plan) + "\n")


def test_what_is_missing_is_downloaded_after_the_plan(
    cores: CoreClaims,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(write_model(tmp_path, SMALL))
    found = HubModel("o/m", None, folder, Weights({"": 9}), ["w"], {"w": 3 << 20})
    fetched: list[HubModel] = []

    def fetch(model: HubModel) -> str:
        assert "plan for o/m" in capsys.readouterr().err
        fetched.append(model)
        return "/there"

    monkeypatch.setattr(hub, "look", lambda *_: found)
    monkeypatch.setattr(hub, "check_disk", lambda _model: None)
    monkeypatch.setattr(preparation, "fetch", fetch)
    config = load({"engine": "fake", "model": "o/m"})
    _, decision = prepare(config, cores)
    assert (fetched, decision.model.directory) == ([found], "/there")
    whole = msgspec.structs.replace(found, missing={})
    monkeypatch.setattr(hub, "look", lambda *_: whole)
    assert prepare(config, cores)[1].model.directory == folder
    assert fetched == [found]
