"""The command line: every option reaches the configuration, mistakes end with code 2 and a reason,
and help is there without loading what only serving needs."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from click.testing import CliRunner, Result

import tinfer
import tinfer.master.app
import tinfer.master.preparation
from tinfer.cli import main
from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master.plan import Plan, WorkerPlan, text_of

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {field.name: field for field in msgspec.structs.fields(ServeConfig)}
# What the options' types cannot say: a value within the bounds that is not the default.
VALUES: dict[str, Any] = {
    "api_key": ("one", "two"),
    "allowed_origins": ("https://a", "https://b"),
    "allowed_methods": ("GET", "POST"),
    "allowed_headers": ("X-A", "X-B"),
    "slo": ("ttft:500", "tpot:50.5"),
    "request_timeout": 2.5,
    "port": 81,
    "gpu_memory_utilization": 0.5,
    "ttft_deadline": 1.5,
    "chunk_size": "384",
    "overflow_risk": 0.25,
    "predictor_accuracy": 0.5,
    "fake_engine": {"step_s": 0.5, "num_blocks": 8.0},
    "engine_arg": {"max_logprobs": 5, "hf_overrides": {"a": [1, None]}, "load_format": "dummy"},
    "served_model_name": ("a", "b/c"),
    "default_chat_template_kwargs": {"enable_thinking": False, "style": "short", "n": [1]},
}


class Ran:
    """What the command handed to the master, instead of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs: list[ServeConfig] = []
        self.error: Exception | None = None
        self.code = 0
        monkeypatch.setattr(tinfer.master.app, "run", self._run)

    def _run(self, config: ServeConfig) -> int:
        self.configs.append(config)
        if self.error is not None:
            raise self.error
        return self.code

    def serve(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["serve", *arguments])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


def other_value(name: str) -> Any:
    """A value that is not the option's default."""
    if name in VALUES:
        return VALUES[name]
    default = FIELDS[name].default
    hint = typing.get_type_hints(ServeConfig)[name]
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)[-1]
    if hint is bool:
        return not default
    if hint is float:
        return default + 1.5
    return default + 1 if hint is int else 12 if int in typing.get_args(hint) else "/some/text"


def flags_of(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if name == "model":
        return [value]
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, tuple):
        return [word for item in value for word in (flag, item)]
    if isinstance(value, dict):
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
        return [word for key, text in texts.items() for word in (flag, f"{key}={text}")]
    return [flag, str(value)]


def test_no_flag_is_the_default_configuration(ran: Ran) -> None:
    assert ran.serve().exit_code == 0
    assert ran.configs == [ServeConfig()]


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_reaches_the_configuration(ran: Ran, name: str) -> None:
    value = other_value(name)
    result = ran.serve(*flags_of(name, value))
    assert result.exit_code == 0, result.output
    assert value != getattr(ServeConfig(), name)
    assert ran.configs == [msgspec.structs.replace(ServeConfig(), **{name: value})]


def test_names_and_values_may_come_as_an_object(ran: Ran) -> None:
    words = ["--default-chat-template-kwargs", '{"enable-thinking": false}', "--engine-arg"]
    assert ran.serve(*words, '{"max_logprobs": 5}', *words[:1], "a=b").exit_code == 0
    (config,) = ran.configs
    assert config.default_chat_template_kwargs == {"enable_thinking": False, "a": "b"}
    assert config.engine_arg == {"max_logprobs": 5}
    refused = ran.serve("--default-chat-template-kwargs", "{1: 2}")
    assert refused.exit_code == 2 and "--default-chat-template-kwargs" in refused.output


def test_all_options_at_once(ran: Ran) -> None:
    values = {name: other_value(name) for name in FIELDS}
    result = ran.serve(*(word for name, value in values.items() for word in flags_of(name, value)))
    assert result.exit_code == 0, result.output
    assert ran.configs == [ServeConfig(**values)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "65536"], "--port"),
        (["--port", "x"], "--port"),
        (["--prefill", "-1"], "--prefill"),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization"),
        (["--max-model-len", "0"], "--max-model-len"),
        (["--start-timeout", "0"], "--start-timeout"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout"),
        (["--shutdown-timeout", "inf"], "--shutdown-timeout"),
        (["--route", "both"], "--route"),
        (["--fake-engine", "step_s"], "--fake-engine"),
        (["--fake-engine", "=1"], "--fake-engine"),
        (["--fake-engine", "step_s=fast"], "--fake-engine"),
        (["--no-such-option"], "--no-such-option"),
        (["a", "b"], "b"),
        (["--prefill", "0", "--decode", "0"], "--prefill and --decode"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size"),
        (["--cpu-threads", "0"], "--cpu-threads"),
        (["--json", "-"], "--json goes with --dry-run or --print-config"),
        (["--route", "split", "--decode", "0"], "--route split"),
        (["--print-config", "--dry-run"], "--print-config does not go with --dry-run"),
        (["--config", "/no/such.toml"], "--config: cannot read /no/such.toml"),
        (["--config", "options.ini"], "--config options.ini: its name has to end with .toml"),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_line_that_names_it(
    ran: Ran, arguments: list[str], words: str
) -> None:
    result = ran.serve(*arguments)
    assert result.exit_code == 2
    assert ran.configs == []
    *usage, line = result.stderr.splitlines()
    assert words in line
    assert line.startswith(("Error: ", "tinfer: "))
    assert all(text.startswith(("Usage: ", "Try ")) or not text for text in usage)
    assert result.stdout == ""


def test_a_start_that_fails_is_one_line(ran: Ran) -> None:
    ran.error = StartError("the port is in use")
    result = ran.serve()
    assert (result.exit_code, result.stderr) == (2, "tinfer: the port is in use\n")


PLAN = Plan(
    model="m",
    directory="/m",
    download_bytes=0,
    dtype="bfloat16",
    weights_bytes=1 << 20,
    max_model_len=64,
    kv_bytes_per_token=128,
    tensor_parallel_size=1,
    route="auto",
    transport="none",
    workers=(
        WorkerPlan(
            id="both-0",
            role="both",
            device="cpu",
            label="core 0",
            gpus=(),
            cores=(0,),
            threads=1,
            memory_share=None,
            weights_bytes=1 << 20,
            kv_bytes=1 << 20,
            kv_tokens=8192,
        ),
    ),
    reasons=("it is so",),
)


def planned(ran: Ran, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """The command on a plan that is made up; nothing may be run."""
    monkeypatch.setattr(tinfer.master.preparation, "dry_run", lambda config: PLAN)
    result = ran.serve("--dry-run", *arguments)
    assert ran.configs == []
    return result


def test_a_dry_run_prints_the_plan(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    result = planned(ran, monkeypatch)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == text_of(PLAN) + "\n"


def test_a_dry_runs_json_goes_to_a_file_beside_the_text(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    result = planned(ran, monkeypatch, "--json", str(path))
    assert result.stdout == text_of(PLAN) + "\n"
    assert msgspec.json.decode(path.read_bytes(), type=Plan) == PLAN


def test_a_dry_runs_json_on_standard_output_is_alone(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = planned(ran, monkeypatch, "--json", "-")
    assert msgspec.json.decode(result.stdout, type=Plan) == PLAN


def test_a_dry_run_that_would_not_start_says_why(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_config: ServeConfig) -> Plan:
        raise StartError("too large")

    monkeypatch.setattr(tinfer.master.preparation, "dry_run", refuse)
    result = ran.serve("--dry-run", "--json", "-")
    assert (result.exit_code, result.stderr) == (2, "tinfer: too large\n")
    assert msgspec.json.decode(result.stdout) == {"error": "too large"}


def test_json_that_cannot_be_written(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    result = planned(ran, monkeypatch, "--json", "/no/such/folder/plan.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("tinfer: cannot write /no/such/folder/plan.json: ")


def test_the_masters_exit_code_is_the_commands(ran: Ran) -> None:
    ran.code = 7
    assert ran.serve().exit_code == 7


def test_help_shows_every_option_with_its_meaning_and_default() -> None:
    result = CliRunner().invoke(main, ["serve", "--help"], terminal_width=400)
    assert result.exit_code == 0
    for name in FIELDS.keys() - {"model"}:
        assert f"--{name.replace('_', '-')}" in result.output
    assert "Data type of weights and activations.  [default: auto]" in result.output
    assert "[default: 8000; 0<=x<=65535]" in result.output


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "serve" in result.output
    assert CliRunner().invoke(main, ["no-such-command"]).exit_code == 2


def test_the_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"tinfer, version {tinfer.__version__}\n"


HEAVY = ("torch", "vllm", "aiohttp", "transformers", "uvloop", "zmq", "numpy", "tinfer.master.app")
SCRIPT = f"""
import sys
from tinfer.cli import main
try:
    main(sys.argv[1:], prog_name="tinfer")
except SystemExit as end:
    code = end.code
sys.stderr.write(" ".join(name for name in {HEAVY!r} if name in sys.modules))
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["top", "--help"], ["serve", "--port", "x"]]
)
def test_help_and_mistakes_load_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "--help" in arguments:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Usage: tinfer")
    else:
        assert done.returncode == 2
        assert done.stderr.endswith("is not a valid integer range.\n")
