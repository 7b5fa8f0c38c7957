"""Flags go before the environment, the environment before the file, the file before defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

import tinfer.master.app
from tests.unit.test_cli import FIELDS, other_value
from tinfer.cli import main
from tinfer.config import ServeConfig


class Ran:
    """The command line with an environment of its own; what it would have served is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        self.configs: list[ServeConfig] = []
        monkeypatch.setattr(tinfer.master.app, "run", self._run)
        for name in ("TINFER_API_KEY", "VLLM_API_KEY"):
            monkeypatch.delenv(name, raising=False)

    def _run(self, config: ServeConfig) -> int:
        self.configs.append(config)
        return 0

    def file(self, text: str) -> str:
        path = self._folder / "options.toml"
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    def result(self, *words: str, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(main, ["serve", *words], env=env)

    def config(self, *words: str, env: dict[str, str] | None = None) -> ServeConfig:
        result = self.result(*words, env=env)
        assert result.exit_code == 0, result.output
        return self.configs.pop()

    def shown(self, *words: str, env: dict[str, str] | None = None) -> dict[str, tuple[Any, ...]]:
        """What --print-config tells, as (value, source, name)."""
        result = self.result("--print-config", "--json", "-", *words, env=env)
        assert result.exit_code == 0, result.output
        assert self.configs == []
        told = msgspec.json.decode(result.stdout)
        return {name: (row["value"], row["source"], row["name"]) for name, row in told.items()}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ran:
    return Ran(monkeypatch, tmp_path)


def test_each_layer_goes_before_the_next(ran: Ran) -> None:
    path = ran.file("port = 1\nmax_num_seqs = 1\nmax_model_len = 1\nroute = 'whole'")
    env = {"TINFER_PORT": "2", "TINFER_MAX_NUM_SEQS": "2", "TINFER_CONFIG": path}
    config = ran.config("--port", "3", env=env)
    assert (config.port, config.max_num_seqs, config.max_model_len) == (3, 2, 1)
    assert (config.route, config.host) == ("whole", "127.0.0.1")


def test_a_flag_that_says_the_default_still_goes_before(ran: Ran) -> None:
    path = ran.file("port = 1\nenforce_eager = true")
    config = ran.config("--config", path, "--port", "8000", "--no-enforce-eager")
    assert config == ServeConfig()


def test_the_flag_goes_before_the_variable_for_the_file_too(ran: Ran) -> None:
    path = ran.file("port = 1")
    assert ran.config("--config", path, env={"TINFER_CONFIG": "/no/such.toml"}).port == 1


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


@pytest.mark.parametrize("name", FIELDS.keys() - {"api_key"})
def test_every_option_has_a_variable(ran: Ran, name: str) -> None:
    value = other_value(name)
    config = ran.config(env={f"TINFER_{name.upper()}": text_of(value)})
    assert config == msgspec.structs.replace(ServeConfig(), **{name: value})


def test_several_values_as_words(ran: Ran) -> None:
    env = {
        "TINFER_SERVED_MODEL_NAME": "a b",
        "TINFER_ENGINE_ARG": "max_logprobs=5 load_format=dummy",
    }
    config = ran.config(env=env)
    assert config.served_model_name == ("a", "b")
    assert config.engine_arg == {"max_logprobs": 5, "load_format": "dummy"}


def test_an_empty_variable_is_none(ran: Ran) -> None:
    assert ran.config(env={"TINFER_PORT": "", "TINFER_MODEL": ""}) == ServeConfig()


def test_names_inside_an_option_are_put_together(ran: Ran) -> None:
    path = ran.file("[engine_args]\nmax_logprobs = 1\nswap = 1\nload_format = 'dummy'")
    env = {"TINFER_ENGINE_ARG": '{"max_logprobs": 2, "swap": 2}'}
    words = ("--config", path, "--engine-arg", "max-logprobs=3")
    config = ran.config(*words, env=env)
    assert config.engine_arg == {"max_logprobs": 3, "swap": 2, "load_format": "dummy"}
    shown = ran.shown(*words, env=env)
    assert shown["engine_arg.max_logprobs"] == (3, "flag", None)
    assert shown["engine_arg.swap"] == (2, "environment", "TINFER_ENGINE_ARG")
    assert shown["engine_arg.load_format"] == ("dummy", "file", path)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TINFER_PORT", "tcp://10.0.0.1:8000"),
        ("TINFER_ROUTE", "both"),
        ("TINFER_ENFORCE_EAGER", "perhaps"),
        ("TINFER_ALLOWED_ORIGINS", '["https://a"'),
        ("TINFER_ALLOWED_ORIGINS", "[1]"),
        ("TINFER_FAKE_ENGINE", '{"step_s": "fast"}'),
        ("TINFER_ENGINE_ARG", "max_logprobs"),
    ],
)
def test_a_bad_variable_is_named(ran: Ran, variable: str, value: str) -> None:
    result = ran.result(env={variable: value})
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"Error: Invalid value for '{variable}': ")


def test_what_is_refused_in_a_file_ends_the_command(ran: Ran) -> None:
    path = ran.file("prot = 1")
    result = ran.result("--config", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"tinfer: {path}: prot: ")


# --- what is shown ------------------------------------------------------------------------------


def test_the_printed_configuration_is_the_one_that_is_served(ran: Ran) -> None:
    path = ran.file("max_model_len = 1")
    words, env = ("/m", "--port", "3", "--config", path), {"TINFER_ROUTE": "whole"}
    shown = ran.shown(*words, env=env)
    config = ran.config(*words, env=env)
    told = msgspec.json.decode(msgspec.json.encode(config))
    told["api_key"] = "not set"
    assert {name: value for name, (value, _, _) in shown.items()} == told
    assert shown.keys() == set(FIELDS)
    assert {n: row for n, row in shown.items() if row[1] != "default"} == {
        "model": ("/m", "flag", None),
        "port": (3, "flag", None),
        "max_model_len": (1, "file", path),
        "route": ("whole", "environment", "TINFER_ROUTE"),
    }


def test_as_text_it_is_one_line_per_option(ran: Ran) -> None:
    result = ran.result("--print-config", "--port", "3", env={"TINFER_SLO": "ttft:5"})
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines()}
    assert result.exit_code == 0
    assert lines.keys() == set(FIELDS)
    assert lines["port"] == "3  (flag)"
    assert lines["slo"] == '["ttft:5"]  (environment TINFER_SLO)'
    assert lines["model"] == "–  (default)"
    assert lines["enforce_eager"] == "false  (default)"


def test_it_goes_to_a_file_beside_the_text(ran: Ran, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    result = ran.result("--print-config", "--json", str(path))
    assert result.exit_code == 0 and result.stdout.startswith("model ")
    assert msgspec.json.decode(path.read_bytes())["port"]["value"] == 8000


def test_a_configuration_that_is_none_is_not_shown(ran: Ran) -> None:
    result = ran.result("--print-config", "--json", "-", "--prefill", "0", "--decode", "0")
    assert result.exit_code == 2
    assert "no worker" in msgspec.json.decode(result.stdout)["error"]


# --- API keys -----------------------------------------------------------------------------------

SECRET = "sk-very-secret"


@pytest.mark.parametrize(
    ("words", "text", "env", "told"),
    [
        ((), "", {}, ("not set", "default", None)),
        (("--api-key", SECRET), "", {}, ("set", "flag", None)),
        ((), f"api_key = '{SECRET}'", {}, ("set", "file", "FILE")),
        ((), "", {"TINFER_API_KEY": SECRET}, ("set", "environment", "TINFER_API_KEY")),
        ((), "", {"VLLM_API_KEY": SECRET}, ("set", "environment", "VLLM_API_KEY")),
    ],
)
def test_a_key_is_never_shown(
    ran: Ran, words: tuple[str, ...], text: str, env: dict[str, str], told: tuple[Any, ...]
) -> None:
    path = ran.file(text)
    row = ran.shown(*words, "--config", path, env=env)["api_key"]
    assert row == tuple(path if part == "FILE" else part for part in told)
    as_text = ran.result("--print-config", *words, "--config", path, env=env)
    assert as_text.exit_code == 0 and SECRET not in as_text.output


def test_a_key_of_the_environment_goes_before_those_of_the_file(ran: Ran) -> None:
    """It is the only one then: it is taken where no option names a key."""
    path = ran.file("api_key = 'sk-file'\napi_key_file = '/keys'")
    config = ran.config("--config", path)
    assert (config.api_key, config.api_key_file) == (("sk-file",), "/keys")
    config = ran.config("--config", path, env={"TINFER_API_KEY": "sk-env"})
    assert (config.api_key, config.api_key_file) == ((), None)
    config = ran.config("--config", path, "--api-key", "sk-flag", env={"TINFER_API_KEY": "sk-env"})
    assert config.api_key == ("sk-flag",)


def test_an_empty_key_of_the_environment_is_not_passed_over(ran: Ran) -> None:
    """It was meant to protect the server: the start ends with it, where the keys are read."""
    path = ran.file("api_key = 'sk-file'")
    assert ran.config("--config", path, env={"TINFER_API_KEY": ""}).api_key == ()
