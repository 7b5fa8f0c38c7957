"""vLLM's engine arguments: which are passed on, which are refused and why, which values fit."""

from __future__ import annotations

import ast
import enum
import importlib.util
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from click.testing import CliRunner
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tests.wire.samples import SPEC
from tinfer.cli import main
from tinfer.config import ServeConfig, load
from tinfer.engine_args import REFUSED_NAMES, plain_name, refusal, why_no_option
from tinfer.errors import StartError
from tinfer.wire.control import CannotFork, FrameReader
from tinfer.worker import zygote
from tinfer.worker.engine_arguments import UnfitArgument, converted

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ServeConfig.__struct_fields__
# Of other versions of vLLM, or of its command line alone.
NOT_OF_THIS_VERSION = {"device"}


def vllms_names() -> set[str]:
    """The fields of vLLM's EngineArgs, read without importing it."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None
    tree = ast.parse((Path(found.origin).parent / "engine" / "arg_utils.py").read_text())
    (kind,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "EngineArgs"]
    return {str(ast.unparse(n.target)) for n in kind.body if isinstance(n, ast.AnnAssign)}


def set_by_the_worker() -> set[str]:
    """The engine arguments that `engine_build` and the ranks set over all others."""
    names: set[str] = set()
    for name in ("engine_build.py", "ranks/build.py"):
        tree = ast.parse((ROOT / "tinfer" / "worker" / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
                names |= {k.value for k in node.value.keys if isinstance(k, ast.Constant)}  # type: ignore[misc]
    return names


def test_every_refused_name_is_one_of_vllms() -> None:
    assert set(REFUSED_NAMES) - NOT_OF_THIS_VERSION <= vllms_names()


def test_what_the_worker_sets_is_refused() -> None:
    own = set_by_the_worker()
    assert {"kv_transfer_config", "scheduler_cls", "distributed_executor_backend"} <= own
    assert {name for name in own if refusal(name, None, OPTIONS) is None} == set()


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_a_refused_argument_is_one_line_with_the_reason(name: str) -> None:
    with pytest.raises(StartError) as caught:
        load({"engine_arg": {name: 1}})
    assert caught.value.message.startswith(f"bad option --engine-arg {name}: ")
    assert "\n" not in caught.value.message
    assert why_no_option(f"--{name.replace('_', '-')}") == refusal(name, 1, ())


@pytest.mark.parametrize("name", sorted(vllms_names() & set(OPTIONS) - {"model"}))
def test_what_is_an_option_of_tinfer_is_named(name: str) -> None:
    assert refusal(name, 1, OPTIONS) == f"use tinfer's own --{name.replace('_', '-')}"


def test_a_key_inside_an_object_is_refused() -> None:
    asked: dict[str, Any] = {"hisparse_config": {}}
    reason = refusal("attention_config", asked, OPTIONS)
    assert reason is not None and reason.startswith(
        "hisparse_config: it forces vLLM's model runner"
    )
    assert refusal("attention_config", {"backend": "FLASH_ATTN"}, OPTIONS) is None


@pytest.mark.parametrize("name", ["max_logprobs", "load_format", "attention_backend", "unheard_of"])
def test_anything_else_is_passed_on(name: str) -> None:
    assert load({"engine_arg": {name: "x"}}).engine_arg == {name: "x"}


@pytest.mark.parametrize(
    "written", ["max_logprobs", "max-logprobs", "--max-logprobs", " max_logprobs"]
)
def test_names_may_be_written_as_flags(written: str) -> None:
    assert plain_name(written) == "max_logprobs"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--speculative-config", "no speculative decoding"),
        ("--enable-sleep-mode", "no sleep mode"),
        ("--no-enable-sleep-mode", "no sleep mode"),
        ("--pipeline-parallel-size", "no pipeline parallelism"),
        ("--data-parallel-size", "no data parallelism"),
        ("--max-logprobs", "--engine-arg max_logprobs=VALUE"),
        ("--prot", "Did you mean"),
    ],
)
def test_an_option_of_vllm_serve_that_is_none_here(flag: str, told: str) -> None:
    result = CliRunner().invoke(main, ["serve", flag, "1"])
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert flag in line and told in line


def test_the_bound_of_logprobs_holds_for_the_api_too() -> None:
    assert load({}).max_logprobs == 20
    assert load({"engine_arg": {"max_logprobs": 5}}).max_logprobs == 5
    assert load({"engine_arg": {"max_logprobs": "x"}}).max_logprobs == 20


# --- values --------------------------------------------------------------------------------------


class Backend(enum.Enum):
    FLASH = "a.b.Flash"
    TORCH = "a.b.Torch"


class Opaque:
    """What JSON has no value for."""


@dataclass(config=ConfigDict(extra="forbid"))
class Compilation:
    level: int = 0
    backend: str = ""


HINTS: Mapping[str, Any] = {
    "max_logprobs": int,
    "swap_gb": Annotated[float, "in GiB"],
    "is_fast": bool,
    "name": str | None,
    "mode": Literal["raw", "processed"],
    "backend": Backend | None,
    "patterns": str | list[str],
    "params": set[str],
    "overrides": dict[str, Any] | Opaque,
    "compilation": Compilation,
    "opaque": Opaque | None,
    "anything": Any,
    "quantization": Literal["fp8"] | None,
}


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("max_logprobs", 5, 5),
        ("swap_gb", 4, 4.0),
        ("is_fast", True, True),
        ("name", "x", "x"),
        ("name", None, None),
        ("mode", "raw", "raw"),
        ("backend", "FLASH", Backend.FLASH),
        ("backend", "flash", Backend.FLASH),
        ("backend", "a.b.Torch", Backend.TORCH),
        ("patterns", "x", "x"),
        ("patterns", ["x"], ["x"]),
        ("params", ["x"], {"x"}),
        ("overrides", {"a": [1]}, {"a": [1]}),
        ("compilation", {"level": 3}, Compilation(level=3)),
        ("opaque", None, None),
        ("anything", [1], [1]),
    ],
)
def test_a_value_that_fits_is_as_vllm_wants_it(name: str, value: Any, result: Any) -> None:
    fitted = converted({name: value}, HINTS)[name]
    assert (fitted, type(fitted)) == (result, type(result))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_logprob", 5, "has no such engine argument; did you mean max_logprobs?"),
        ("quite_another", 5, "has no such engine argument"),
        ("max_logprobs", "5", '"5" is not what vLLM takes: an integer'),
        ("max_logprobs", 1.5, "1.5 is not what vLLM takes: an integer"),
        ("max_logprobs", True, "true is not what vLLM takes: an integer"),
        ("max_logprobs", None, "null is not what vLLM takes: an integer"),
        ("swap_gb", "4", '"4" is not what vLLM takes: a number'),
        ("is_fast", 1, "1 is not what vLLM takes: true or false"),
        ("name", 5, "5 is not what vLLM takes: text, null"),
        ("mode", "cooked", '"cooked" is not what vLLM takes: raw, processed'),
        ("backend", "slow", '"slow" is not what vLLM takes: FLASH, TORCH, null'),
        ("patterns", [1], "[1] is not what vLLM takes: text, a list (list[str])"),
        ("overrides", 1, "1 is not what vLLM takes: an object"),
        ("compilation", 3, "3 is not what vLLM takes: an object of Compilation"),
        (
            "compilation",
            {"level": "x"},
            '{"level":"x"} is not what vLLM takes: an object of Compilation (level: Input should',
        ),
        (
            "compilation",
            {"lvl": 1},
            '{"lvl":1} is not what vLLM takes: an object of Compilation (l',
        ),
        ("opaque", "x", '"x" is not what vLLM takes: null'),
        ("name", ["x" * 500], f'["{"x" * 78}... is not what vLLM takes: text'),
    ],
)
def test_a_value_that_does_not_fit(
    name: str, value: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinfer.worker.engine_arguments._vllm", lambda: "vLLM")
    with pytest.raises(UnfitArgument) as caught:
        converted({"is_fast": True, name: value}, HINTS)
    assert "\n" not in str(caught.value)
    reason = str(caught.value).removeprefix(f"--engine-arg {name}: ").removeprefix("vLLM ")
    assert reason.startswith(told)


def test_an_option_of_tinfer_is_called_by_its_flag() -> None:
    with pytest.raises(UnfitArgument, match=r"^--quantization: \"fp9\" is not what"):
        converted({"quantization": "fp9"}, HINTS)


def test_the_import_process_forks_nothing_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinfer.worker.engine_arguments.engine_hints", lambda: HINTS)
    misfit = msgspec.structs.replace(SPEC, engine="vllm", engine_args={"max_logprob": 1})
    reason = zygote._misfit(misfit)
    assert reason is not None and "did you mean max_logprobs?" in reason
    assert zygote._misfit(msgspec.structs.replace(misfit, engine_args={"name": "x"})) is None
    # The fake engine has no vLLM to ask.
    assert zygote._misfit(msgspec.structs.replace(misfit, engine="fake")) is None
    ours, its = socket.socketpair()
    with ours, its:
        starter = zygote.Zygote(its, -1, Path("/nowhere"), "vllm", None)
        starter._start(misfit)
        (report,) = FrameReader().feed(ours.recv(1 << 16))
        os.close(starter._child_read)
        os.close(starter._child_write)
    assert report == CannotFork(misfit.worker_id, misfit.generation, reason)
