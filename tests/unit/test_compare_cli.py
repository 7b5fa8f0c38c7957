"""`tinfer bench compare`: every option reaches the comparison, mistakes end with code 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tinfer.bench.compare.app as app
import tinfer.bench.compare.options as compare
from tinfer.bench.compare.arms import Arm, default_arms
from tinfer.bench.compare.options import CompareOptions
from tinfer.cli import main
from tinfer.errors import StartError


class Ran:
    """What the command handed on, instead of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[CompareOptions, Sequence[Arm]]] = []
        self.error: BaseException | None = None
        self.code = 0
        monkeypatch.setattr(app, "run", self._run)
        monkeypatch.setattr(compare, "device_for", lambda num_workers: "cpu")

    def _run(self, options: CompareOptions, arms: Sequence[Arm]) -> int:
        self.given.append((options, arms))
        if self.error is not None:
            raise self.error
        return self.code

    def compare(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["bench", "compare", *arguments])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


def test_no_flag_is_what_was_fixed_before_measuring(ran: Ran) -> None:
    result = ran.compare()
    assert result.exit_code == 0, result.output
    ((options, arms),) = ran.given
    assert options == CompareOptions() and arms == default_arms()
    assert options.workloads == ("Mixed", "LPHD", "HPLD", "burst")
    assert options.loads == (0.5, 0.75, 0.95) and options.repetitions >= 5


def test_every_option_has_a_flag_that_reaches_it(ran: Ran, tmp_path: Path) -> None:
    flags: dict[str, tuple[str, Any]] = {
        "workloads": ("burst", ("burst",)),
        "loads": ("0.3", (0.3,)),
        "repetitions": ("2", 2),
        "num_requests": ("7", 7),
        "seed": ("3", 3),
        "length_scale": ("0.5", 0.5),
        "max_prompt_tokens": ("9", 9),
        "max_output_tokens": ("8", 8),
        "baseline": ("replicas", "replicas"),
        "full_load": ("burst=2", {"burst": 2.0}),
        "probe_s": ("5", 5.0),
        "num_unloaded": ("2", 2),
        "num_warmups": ("1", 1),
        "num_resamples": ("200", 200),
        "device": ("cuda", "cuda"),
        "num_workers": ("4", 4),
        "gpus": ("0,GPU-a,2,3", ("0", "GPU-a", "2", "3")),
        "cores": ("0-1,4", (0, 1, 4)),
        "threads": ("2", 2),
        "residency": ("together", "together"),
        "kv_cache_memory_bytes": ("99", 99),
        "dtype": ("float32", "float32"),
        "block_size": ("16", 16),
        "max_num_seqs": ("32", 32),
        "max_model_len": ("100", 100),
        "tinfer_args": ("--route 'a b'", ("--route", "a b")),
        "vllm_args": ("--x 1", ("--x", "1")),
        "vllm_command": ("python -m vllm", ("python", "-m", "vllm")),
        "start_timeout_s": ("5", 5.0),
        "json_path": ("-", "-"),
        "plot_dir": (str(tmp_path), tmp_path),
        "log_dir": (str(tmp_path), tmp_path),
    }
    spelled = {
        "threads": "cpu-threads",
        "start_timeout_s": "start-timeout",
        "json_path": "json",
        "plot_dir": "plot",
    }
    words = ["/model"]
    for name, (text, _) in flags.items():
        words += [f"--{spelled.get(name, name.replace('_', '-'))}", text]
    switches = {"enforce_eager": True, "save_detailed": True, "resume": True, "dry_run": True}
    words += [f"--{name.replace('_', '-')}" for name in switches]
    words += ["--no-enable-prefix-caching", "--keep-servers"]
    result = ran.compare(*words)
    assert result.exit_code == 0, result.output
    ((options, _),) = ran.given
    wanted = {name: value for name, (_, value) in flags.items()}
    wanted |= {"model": "/model", "enable_prefix_caching": False, **switches}
    wanted["restart_servers"] = False
    assert {name: getattr(options, name) for name in CompareOptions.__struct_fields__} == wanted
    default = CompareOptions()
    assert [n for n in wanted if getattr(options, n) == getattr(default, n)] == ["residency"]


def test_one_arm_at_a_time_on_gpus(ran: Ran) -> None:
    assert ran.compare("--device", "cuda").exit_code == 0
    assert ran.given[0][0].residency == "alone"


def test_arms_by_name(ran: Ran) -> None:
    assert ran.compare("--arms", "replicas=a,replicas=b").exit_code == 0
    assert ran.given[0][1] == (Arm("a", "replicas"), Arm("b", "replicas"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--arms", "nonsense"),
        ("--arms", "tinfer-auto"),
        ("--workloads", "nonsense"),
        ("--loads", "0"),
        ("--full-load", "Mixed"),
        ("--cores", "a-b"),
        ("--num-workers", "1"),
        ("--repetitions", "0"),
    ],
)
def test_mistakes_are_code_2_and_run_nothing(ran: Ran, arguments: tuple[str, ...]) -> None:
    result = ran.compare(*arguments)
    assert (
        result.exit_code == 2
        and "Invalid value for " in result.output
        and arguments[0] in result.output
    )
    assert ran.given == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StartError("no such thing"), 2, "tinfer: no such thing\n"),
        (FileNotFoundError(2, "not there", "/x"), 2, "tinfer: /x: not there\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_cannot_be_done_is_one_line(
    ran: Ran, error: BaseException, code: int, words: str
) -> None:
    ran.error = error
    result = ran.compare()
    assert (result.exit_code, result.stderr) == (code, words)


def test_exit_code_is_the_comparisons(ran: Ran) -> None:
    ran.code = 1
    assert ran.compare().exit_code == 1


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    ran: Ran, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (
        ("--json", str(tmp_path / "nowhere" / "x.json")),
        ("--json", str(tmp_path)),
        ("--plot", str(tmp_path / "file" / "folder")),
    ):
        result = ran.compare(*arguments)
        assert result.exit_code == 2 and result.stderr.startswith("tinfer: cannot write")
    assert ran.given == []
