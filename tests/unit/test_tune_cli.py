"""`tinfer tune`: options reach the measurement, mistakes end with code 2 and a reason."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

import tinfer.tuner.app
from tests.unit.tune_box import IDENTITY, tuning
from tinfer import config as configuration
from tinfer.cli import main
from tinfer.cli.tune import SHARED
from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.tune import store
from tinfer.tune.tuning import Tuning
from tinfer.tuner.app import Interrupted, TuneOptions, with_workers


class Ran:
    """What the command handed on, instead of measuring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.options: list[TuneOptions] = []
        self.error: BaseException | None = None
        monkeypatch.setattr(tinfer.tuner.app, "tune", self._tune)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def _tune(self, options: TuneOptions) -> Tuning:
        self.options.append(options)
        if self.error is not None:
            raise self.error
        return tuning()

    def tune(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["tune", *arguments])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ran:
    return Ran(monkeypatch, tmp_path / "cache")


def error_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.startswith("tinfer: ")
    (line,) = result.stderr.splitlines()
    return line


def test_no_option_measures_the_built_in_model(ran: Ran) -> None:
    result = ran.tune()
    assert result.exit_code == 0, result.output
    config = configuration.load({"max_num_batched_tokens": 8192})
    assert ran.options == [TuneOptions(config=config, repeats=5, seed=0, show_progress=False)]
    assert "chunk     256 tokens" in result.stdout and result.stderr.startswith("stored: ")
    assert store.load_for(IDENTITY) == tuning()


def test_every_option_reaches_it(ran: Ran) -> None:
    flags = ("--dtype", "float32", "--cpu-threads", "3", "--max-model-len", "99", "--enforce-eager")
    result = ran.tune("some/model", *flags, "--max-chunk", "64", "--repeats", "2", "--seed", "9")
    assert result.exit_code == 0, result.output
    (options,) = ran.options
    assert (options.repeats, options.seed) == (2, 9)
    assert options.config == ServeConfig(
        model="some/model",
        dtype="float32",
        cpu_threads=3,
        max_model_len=99,
        enforce_eager=True,
        max_num_batched_tokens=64,
        seed=9,
    )


def test_shared_options_are_those_of_serve_and_no_others() -> None:
    fields = ServeConfig.__struct_fields__
    assert set(SHARED) <= set(fields)
    shown = {p.name for p in main.get_command(None, "tune").params}  # type: ignore
    own = {"model", "max_chunk", "repeats", "seed", "stored", "json_path", "plot_dir"}
    assert shown == {*SHARED, *own}


def test_json_alone_on_standard_output(ran: Ran) -> None:
    result = ran.tune("--json", "-")
    assert result.exit_code == 0
    assert msgspec.json.decode(result.stdout, type=Tuning) == tuning()


def test_json_beside_the_table(ran: Ran, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = ran.tune("--json", str(path))
    assert result.exit_code == 0 and "decode" in result.stdout
    assert store.read(path) == tuning()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--repeats", "0"),
        ("--max-chunk", "8"),
        ("--seed", "-1"),
        ("--dtype", "int4"),
        ("--cpu-threads", "0"),
        ("--route", "whole"),
        ("a", "b"),
    ],
)
def test_bad_options_are_refused(ran: Ran, arguments: tuple[str, ...]) -> None:
    result = ran.tune(*arguments)
    assert result.exit_code == 2 and "Error:" in result.stderr
    assert ran.options == []


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    ran: Ran, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (
        ("--json", str(tmp_path / "nowhere" / "x.json")),
        ("--json", str(tmp_path)),
        ("--plot", str(tmp_path / "file" / "folder")),
    ):
        assert error_line(ran.tune(*arguments)).startswith("tinfer: cannot write")
    assert ran.options == []


def test_a_failed_start_is_one_line(ran: Ran) -> None:
    ran.error = StartError("the model does not fit")
    assert error_line(ran.tune()) == "tinfer: the model does not fit"
    assert store.load_for(IDENTITY) is None


def test_a_cache_that_cannot_be_written_is_one_line(ran: Ran, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    line = error_line(ran.tune())
    assert str(tmp_path / "cache") in line and "directory" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_is_broken_off_stores_nothing(ran: Ran, error: BaseException, code: int) -> None:
    ran.error = error
    result = ran.tune()
    assert (result.exit_code, result.output) == (code, "")
    assert store.load_for(IDENTITY) is None


def test_stored_shows_and_measures_nothing(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ServeConfig] = []

    def stored(config: ServeConfig) -> Tuning:
        asked.append(config)
        if len(asked) > 1:
            raise StartError("nothing is stored")
        return tuning()

    monkeypatch.setattr(tinfer.tuner.app, "stored", stored)
    result = ran.tune("--stored", "--dtype", "float16")
    assert result.exit_code == 0 and "chunk     256 tokens" in result.stdout
    assert result.stderr == "" and ran.options == []
    assert asked[0].dtype == "float16" and store.load_for(IDENTITY) is None
    assert error_line(ran.tune("--stored")) == "tinfer: nothing is stored"


@pytest.mark.parametrize(
    ("options", "num_gpus", "workers"),
    [
        ({}, 0, (1, 1)),
        ({}, 1, (None, None)),
        ({}, 8, (1, 1)),
        ({"tensor_parallel_size": 4}, 8, (1, 1)),
        ({"tensor_parallel_size": 8}, 8, (None, None)),
        ({"tensor_parallel_size": 2}, 0, (1, 1)),
        ({"prefill_devices": "2", "decode_devices": "3"}, 8, (None, None)),
    ],
)
def test_two_workers_but_for_a_lone_gpu(
    options: dict[str, Any], num_gpus: int, workers: tuple[int | None, int | None]
) -> None:
    config = with_workers(configuration.load(options), num_gpus)
    assert (config.prefill, config.decode) == workers
