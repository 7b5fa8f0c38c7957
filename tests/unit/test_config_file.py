"""The file of `--config`: TOML and YAML say the same, and a mistake names the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tinfer.cli.config_file import read_config_file
from tinfer.config import ServeConfig
from tinfer.errors import StartError

TOML = """
model = "/m"
port = 81
served-model-name = ["a", "b"]
api_key_file = "/keys"
prefill_devices = 0
gpu-memory-utilization = 1
chunk_size = 300
enforce_eager = true
allowed_origins = "https://a"

[engine_args]
max-logprobs = 30
hf_overrides = { rope_theta = 5.0 }

[fake_engine]
step_s = 1
"""
YAML = """
model: /m
port: 81
served-model-name: [a, b]
api_key_file: /keys
prefill_devices: 0
gpu-memory-utilization: 1
chunk_size: 300
enforce_eager: yes
allowed_origins: https://a
engine_args:
  max-logprobs: 30
  hf_overrides: {rope_theta: 5.0}
fake_engine:
  step_s: 1
"""
SAID = {
    "model": "/m",
    "port": 81,
    "served_model_name": ("a", "b"),
    "api_key_file": "/keys",
    "prefill_devices": "0",
    "gpu_memory_utilization": 1.0,
    "chunk_size": "300",
    "enforce_eager": True,
    "allowed_origins": ("https://a",),
    "engine_arg": {"max_logprobs": 30, "hf_overrides": {"rope_theta": 5.0}},
    "fake_engine": {"step_s": 1.0},
}


def written(folder: Path, text: str, name: str = "options.toml") -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def fault(path: str) -> str:
    with pytest.raises(StartError) as caught:
        read_config_file(path)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "text"), [("o.toml", TOML), ("o.yaml", YAML), ("o.yml", YAML), ("o.YML", YAML)]
)
def test_both_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    read = read_config_file(written(tmp_path, text, name))
    assert read == SAID
    assert [type(value) for value in read.values()] == [type(value) for value in SAID.values()]


@pytest.mark.parametrize("name", ["empty.toml", "empty.yaml"])
def test_an_empty_file_says_nothing(tmp_path: Path, name: str) -> None:
    assert read_config_file(written(tmp_path, "", name)) == {}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("prot = 1", "prot: `tinfer serve` has no such option; did you mean port?"),
        ("quite_another = 1", "quite_another: `tinfer serve` has no such option"),
        ("config = 'x.toml'", "config: `tinfer serve` has no such option"),
        ("port = '81'", "port: Expected `int`, got `str`"),
        ("port = 1.5", "port: Expected `int`, got `float`"),
        ("port = true", "port: Expected `int`, got `bool`"),
        ("port = 65536", "port: Expected `int` <= 65535"),
        ("model = 5", "model: Expected `str | null`, got `int`"),
        ("chunk_size = true", "chunk_size: Expected `str`, got `bool`"),
        ("chunk_size = 0", "chunk_size: Expected `str` matching regex"),
        ("enforce_eager = 'yes'", "enforce_eager: Expected `bool`, got `str`"),
        ("route = 'both'", "route: Invalid enum value 'both'"),
        ("served_model_name = [1]", "served_model_name: Expected `str`, got `int` - at `[0]`"),
        ("slo = 'ttft:0'", "slo: ttft:0 is no time"),
        ("shutdown_timeout = inf", "shutdown_timeout: inf is not a finite number"),
        ("fake_engine = { step_s = 'x' }", "fake_engine: Expected `float`, got `str`"),
        ("engine_args = 5", "engine_args: Expected `object`, got `int`"),
        ("engine_args = { seed = 1 }", "engine_args: seed: use tinfer's own --seed"),
        ("engine_args = { spec-model = 'm' }", "engine_args: spec_model: no speculative decoding"),
        ("max_num_seqs = 1\nmax-num-seqs = 2", "max-num-seqs: this option is there twice"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path: Path, line: str, told: str) -> None:
    path = written(tmp_path, line)
    assert fault(path).startswith(f"{path}: {told}")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("o.toml", "port = ", "no TOML: "),
        ("o.toml", "port = 1\nport = 2", "no TOML: "),
        ("o.yaml", "a: [", "no YAML: "),
        ("o.yaml", "- port", "no table of options"),
        ("o.yaml", "!!python/object:os.system {}", "no YAML: "),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, name: str, text: str, told: str) -> None:
    path = written(tmp_path, text, name)
    assert fault(path).startswith(f"{path}: {told}")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "o.toml"
    path.write_bytes(b'host = "\xff"')
    assert "no text in UTF-8" in fault(str(path))


def test_keys_are_not_for_others_to_read(tmp_path: Path) -> None:
    path = written(tmp_path, "api_key = 'sk-1'")
    assert read_config_file(path) == {"api_key": ("sk-1",)}
    Path(path).chmod(0o604)
    assert fault(path) == f"{path}: api_key: the file is open to other users; chmod o= it"
    written(tmp_path, "port = 1")
    Path(path).chmod(0o604)
    assert read_config_file(path) == {"port": 1}


@pytest.mark.parametrize("name", ServeConfig.__struct_fields__)
def test_every_option_may_be_in_a_file(tmp_path: Path, name: str) -> None:
    """Its own default, where that can be written, is a value of the right type."""
    default: Any = getattr(ServeConfig(), name)
    if default is None:
        return
    if isinstance(default, tuple | dict):
        text = "[]" if isinstance(default, tuple) else "{}"
        default = type(default)()
    else:
        text = str(default).lower() if isinstance(default, bool) else repr(default)
    assert read_config_file(written(tmp_path, f"{name} = {text}")) == {name: default}
