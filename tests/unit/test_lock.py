"""The committed pins: exact, from nowhere in particular, and in step with pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import lock
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^[\w.-]+==[\w.+]+( ; (platform_machine|python_full_version|sys_platform)\b.*)?$")


def pins(name: str) -> dict[str, str]:
    lines = lock.lines(ROOT / "requirements" / f"{name}.txt")
    found = [Requirement(line) for line in lines]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in found}


@pytest.mark.parametrize("name", ["cpu", "cuda", "dev"])
def test_every_line_is_an_exact_pin(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert text.startswith(lock.HEADER)
    wrong = [line for line in text.removeprefix(lock.HEADER).splitlines() if not PIN.match(line)]
    assert wrong == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pins_meet_what_the_project_asks_for(device: str) -> None:
    extras = PROJECT["optional-dependencies"]
    pinned = {**pins(device), **pins("dev")}
    for text in PROJECT["dependencies"] + extras[device] + extras["dev"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[wanted.name]), text


def test_torch_is_the_build_for_the_device() -> None:
    assert pins("cpu")["torch"] == "2.13.0+cpu"
    assert pins("cuda")["torch"] == "2.13.0"
    assert not {"torchvision", "torchaudio", "torchcodec"} & (pins("cpu").keys() | pins("cuda"))


def test_keeps_what_some_target_installs() -> None:
    resolved = [
        "everywhere==1",
        "linux==2 ; sys_platform == 'linux'",
        "windows==3 ; sys_platform == 'win32'",
        "newer==4 ; python_full_version >= '3.12'",
    ]
    assert lock.keep_for_targets(resolved) == {
        "everywhere": ["everywhere==1"],
        "linux": ["linux==2"],
        "newer": ['newer==4 ; python_full_version >= "3.12"'],
    }


def test_dev_adds_only_what_a_device_lacks() -> None:
    cpu, cuda = {"a": ["a==1"], "b": ["b==1"]}, {"a": ["a==1"]}
    dev = {"a": ["a==1"], "b": ["b==1"], "c": ["c==1"]}
    assert lock.dev_additions(dev, cpu, cuda) == {"b": ["b==1"], "c": ["c==1"]}
    with pytest.raises(lock.LockError, match=r"requirements/cuda\.txt"):
        lock.dev_additions({"a": ["a==1"]}, cpu, {"a": ["a==2"]})
