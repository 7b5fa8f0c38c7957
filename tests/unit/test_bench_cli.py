"""`tinfer bench`: every option reaches the benchmark, mistakes end with code 2 and a reason."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

import tinfer.bench.app
import tinfer.bench.plots
from tinfer.bench.options import DEFAULT_METRICS, BenchOptions
from tinfer.bench.slo import Slo
from tinfer.cli import main
from tinfer.client.errors import ConnectionFailed
from tinfer.errors import StartError

DEFAULT = BenchOptions(
    base_url="http://127.0.0.1:8000",
    input_len=1024,
    output_len=128,
    request_rate=math.inf,
    burstiness=1.0,
)


class Ran:
    """What the command handed on, instead of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[BenchOptions] = []
        self.error: Exception | None = None
        self.code = 0
        monkeypatch.setattr(tinfer.bench.app, "run", self._run)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def _run(self, options: BenchOptions) -> int:
        self.options.append(options)
        if self.error is not None:
            raise self.error
        return self.code

    def serve(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["bench", "serve", *arguments])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


def test_no_flag_is_vllms_random_workload(ran: Ran) -> None:
    result = ran.serve()
    assert result.exit_code == 0, result.output
    assert ran.options == [DEFAULT]


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("--base-url http://x:1", {"base_url": "http://x:1"}),
        ("--host h --port 81", {"base_url": "http://h:81"}),
        ("--host ::1", {"base_url": "http://[::1]:8000"}),
        ("--endpoint /v2", {"endpoint": "/v2"}),
        ("--model m", {"model": "m"}),
        ("--input-len 5 --output-len 6", {"input_len": 5, "output_len": 6}),
        ("--num-prompts 7", {"num_prompts": 7}),
        ("--seed 8 --salt s", {"seed": 8, "salt": "s"}),
        ("--request-rate 2.5", {"request_rate": 2.5}),
        ("--request-rate inf", {"request_rate": math.inf}),
        ("--burstiness 0.5", {"burstiness": 0.5}),
        ("--max-concurrency 9", {"max_concurrency": 9}),
        ("--wait-for-turns", {"wait_for_turns": True}),
        ("--num-warmups 3", {"num_warmups": 3}),
        ("--ready-check-timeout-sec 4", {"ready_timeout_s": 4.0}),
        ("--goodput ttft:100 tpot:50", {"slo": Slo(ttft=100.0, tpot=50.0)}),
        ("--goodput ttft:100 --goodput e2el:5", {"slo": Slo(ttft=100.0, e2el=5.0)}),
        ("--percentile-metrics ttft,itl", {"metrics": ("ttft", "itl")}),
        ("--metric-percentiles 50,99.9", {"percentiles": (50.0, 99.9)}),
        ("--temperature 0", {"temperature": 0.0}),
        ("--vocab-size 512", {"vocab_size": 512}),
        ("--header a=b=c --header d=", {"headers": {"a": "b=c", "d": ""}}),
        ("--trace", {"trace": True}),
        ("--no-trace", {"trace": False}),
        ("--label two", {"label": "two"}),
        ("--json - --save-detailed", {"json_path": "-", "save_detailed": True}),
        ("--plot here", {"plot_dir": Path("here")}),
    ],
)
def test_every_option_reaches_the_benchmark(
    ran: Ran, arguments: str, changed: dict[str, Any]
) -> None:
    result = ran.serve(*arguments.split())
    assert result.exit_code == 0, result.output
    assert ran.options == [msgspec.structs.replace(DEFAULT, **changed)]
    assert ran.options != [DEFAULT] or arguments == "--request-rate inf"


def test_another_workload_keeps_its_own_lengths_and_rate(ran: Ran) -> None:
    result = ran.serve("--workload", "lphd", "--length-scale", "0.5", "--max-prompt-tokens", "9")
    assert result.exit_code == 0, result.output
    (options,) = ran.options
    assert (options.input_len, options.output_len) == (None, None)
    assert (options.request_rate, options.burstiness) == (None, None)
    assert (options.length_scale, options.max_prompt_tokens) == (0.5, 9)


def test_the_api_key_comes_from_the_environment(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    ran.serve()
    assert ran.options[0].headers == {"Authorization": "Bearer k"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--port 0", "--port"),
        ("--num-prompts 0", "--num-prompts"),
        ("--request-rate 0", "--request-rate"),
        ("--burstiness 0", "--burstiness"),
        ("--max-concurrency 0", "--max-concurrency"),
        ("--goodput itl:5", "itl:5"),
        ("--goodput ttft:1 stray", "stray"),
        ("stray", "stray"),
        ("--percentile-metrics ttft,speed", "speed"),
        ("--metric-percentiles 101", "101"),
        ("--metric-percentiles x", "x"),
        ("--header a", "--header"),
        ("--workload lphd --input-len 5", "--input-len"),
        ("--length-scale 2", "--length-scale"),
        ("--no-such-option", "--no-such-option"),
    ],
)
def test_a_mistake_ends_with_code_2_and_a_line_that_names_it(
    ran: Ran, arguments: str, words: str
) -> None:
    result = ran.serve(*arguments.split())
    assert (result.exit_code, ran.options, result.stdout) == (2, [], "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and words in last


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StartError("no matplotlib"), "tinfer: no matplotlib\n"),
        (ConnectionFailed("nothing answers"), "tinfer: nothing answers\n"),
        (
            PermissionError(13, "Permission denied", "/r.json"),
            "tinfer: /r.json: Permission denied\n",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(ran: Ran, error: Exception, line: str) -> None:
    ran.error = error
    result = ran.serve()
    assert (result.exit_code, result.stderr, result.stdout) == (2, line, "")


def test_ctrl_c_before_anything_was_sent(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: BenchOptions) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(tinfer.bench.app, "run", interrupted)
    assert ran.serve().exit_code == 130


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_exit_code_is_the_benchmarks(ran: Ran, code: int) -> None:
    ran.code = code
    assert ran.serve().exit_code == code


def test_help_names_every_option_and_the_exit_codes() -> None:
    result = CliRunner().invoke(main, ["bench", "serve", "--help"], terminal_width=200)
    assert result.exit_code == 0
    shown = {name.replace("_", "-") for name in BenchOptions.__struct_fields__}
    shown -= {"ready-timeout-s", "metrics", "percentiles", "slo", "headers", "json-path"}
    shown = shown - {"plot-dir", "show-progress", "workload-options"} | {"workload-option", "plot"}
    assert all(f"--{name}" in result.output for name in shown)
    assert "130 after Ctrl-C" in result.output
    assert DEFAULT_METRICS == DEFAULT.metrics


def write_result(path: Path, **fields: Any) -> str:
    path.write_bytes(msgspec.json.encode({"request_throughput": 1.0, **fields}))
    return str(path)


class Drawn:
    """Takes results in the place of matplotlib."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *paths: str) -> None:
        self.asked: list[tuple[list[Any], Path]] = []
        self._paths = [Path(path) for path in paths]
        monkeypatch.setattr(tinfer.bench.plots, "draw_all", self._draw_all)

    def _draw_all(self, results: list[Any], folder: Path) -> list[Path]:
        self.asked.append((results, folder))
        return self._paths


def plot(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "plot", *arguments])


def test_results_are_read_and_drawn_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = Drawn(monkeypatch, "x/a.png", "x/b.png")
    files = [write_result(tmp_path / name, label=name) for name in ("a", "b")]
    result = plot(*files, "--out", "x")
    assert (result.exit_code, result.stdout) == (0, "x/a.png\nx/b.png\n")
    ((results, folder),) = drawn.asked
    assert ([one["label"] for one in results], folder) == (["a", "b"], Path("x"))


def test_nothing_to_draw_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Drawn(monkeypatch)
    result = plot(write_result(tmp_path / "a"))
    assert (result.exit_code, result.stderr.startswith("tinfer: nothing to draw")) == (2, True)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "nonsense"])
def test_a_file_that_is_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    drawn = Drawn(monkeypatch)
    (tmp_path / "a").write_text(text)
    result = plot(str(tmp_path / "a"))
    assert (result.exit_code, drawn.asked) == (2, [])
    assert result.stderr.startswith(f"tinfer: {tmp_path / 'a'} is no result of tinfer bench")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = plot(str(tmp_path / "a"))
    assert result.exit_code == 2
    assert result.stderr == f"tinfer: {tmp_path / 'a'}: No such file or directory\n"


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    ran: Ran, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (
        ("--json", str(tmp_path / "nowhere" / "x.json")),
        ("--json", str(tmp_path)),
        ("--plot", str(tmp_path / "file" / "folder")),
    ):
        result = ran.serve(*arguments)
        assert result.exit_code == 2 and result.stderr.startswith("tinfer: cannot write")
    assert ran.options == []
