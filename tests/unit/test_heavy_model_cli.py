"""`tinfer bench model`: what it prints, what it writes, how it ends; and the cost it works out."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import pytest
from click.testing import CliRunner, Result

from tinfer import own_server
from tinfer.bench import heavy_model, prefill_cost
from tinfer.bench.heavy_model import DEFAULT_SIZE, SIZES, Shape
from tinfer.bench.outcome import Outcome
from tinfer.bench.prefill_cost import PrefillCost, cost_of
from tinfer.cli import bench_model, main
from tinfer.client.errors import ConnectionFailed
from tinfer.errors import StartError

SMALL = Shape(num_layers=1, hidden_size=256, intermediate_size=64)
COST = PrefillCost(
    prompt_tokens=1024,
    output_tokens=64,
    num_repeats=2,
    prefill_ms=300.04,
    decode_step_ms=10.0,
    ratio=30.004,
    ttft_ms=[299.0, 301.08],
    itl_ms=[9.0, 11.0],
)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heavy_model, "SIZES", MappingProxyType(dict.fromkeys(SIZES, SMALL)))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", "model", *map(str, arguments)])


class Box:
    """Stands in for the server and for asking it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[Sequence[str]] = []
        self.num_stopped = 0
        self.error: BaseException | None = None
        box = self

        class Server:
            url = "http://127.0.0.1:1"

            def __init__(self, arguments: Sequence[str], show: Callable[[str], None]) -> None:
                box.started.append(arguments)
                show("loading")

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                box.num_stopped += 1

        monkeypatch.setattr(own_server, "OwnServer", Server)
        monkeypatch.setattr(prefill_cost, "measure", self._measure)

    def _measure(self, url: str) -> PrefillCost:
        assert url == "http://127.0.0.1:1"
        if self.error is not None:
            raise self.error
        return COST


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(monkeypatch)


def test_the_names_of_sizes_are_those_that_there_are() -> None:
    assert tuple(SIZES) == bench_model.SIZE_NAMES
    assert bench_model.SIZE_NAMES[0] == DEFAULT_SIZE


def test_made_then_up_to_date(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    first, second = run(folder), run(folder)
    assert (first.exit_code, first.stderr) == (second.exit_code, second.stderr) == (0, "")
    rest = f"50m, seed 0, {SMALL.num_parameters / 1e6:.1f} M parameters, 0 MiB\n"
    assert first.stdout == f"{folder} is made: {rest}"
    assert second.stdout == f"{folder} is up to date: {rest}"


def test_json_alone_on_standard_output(tmp_path: Path) -> None:
    result = run(tmp_path / "m", "--size", "100m", "--seed", "7", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "path": str(tmp_path / "m"),
        "size": "100m",
        "seed": 7,
        "num_parameters": SMALL.num_parameters,
        "weights_bytes": SMALL.weights_bytes,
        "made": True,
        "measured": None,
    }


def test_measured_on_a_server_of_its_own(tmp_path: Path, box: Box) -> None:
    path = tmp_path / "r.json"
    result = run(tmp_path / "m", "--measure", "--cpu-threads", "2", "--json", path)
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last == "1K-token prefill 300.0 ms, decode step 10.00 ms: ratio 30.0"
    assert result.stderr == "loading\n"
    ((folder, *options),) = box.started
    assert folder == str(tmp_path / "m") and box.num_stopped == 1
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    assert (pairs["--prefill"], pairs["--decode"], pairs["--route"]) == ("1", "0", "whole")
    assert pairs["--cpu-threads"] == "2"
    measured = json.loads(path.read_text())["measured"]
    assert (measured["cpu_threads"], measured["ratio"]) == (2, 30.004)
    assert measured.keys() == {"cpu_threads", *PrefillCost.__struct_fields__}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StartError("cannot measure: x"), 2, "tinfer: cannot measure: x\n"),
        (ConnectionFailed("nothing answers"), 2, "tinfer: nothing answers\n"),
        (PermissionError(13, "Permission denied", "/m"), 2, "tinfer: /m: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_stops_the_server(
    tmp_path: Path, box: Box, error: BaseException, code: int, line: str
) -> None:
    box.error = error
    result = run(tmp_path / "m", "--measure", "--json", "-")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "loading\n" + line
    assert box.num_stopped == 1


def test_sigterm_stops_the_server_too(
    tmp_path: Path, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(prefill_cost, "measure", lambda url: signal.raise_signal(signal.SIGTERM))
    result = run(tmp_path / "m", "--measure")
    assert (result.exit_code, box.num_stopped) == (143, 1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = run(tmp_path, "--json", "-")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"tinfer: {tmp_path} is not empty")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "m")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("tinfer: ") and line.endswith(": File exists")


def test_a_result_that_cannot_be_written_is_said_before_anything_is_done(
    tmp_path: Path, box: Box
) -> None:
    for path in (tmp_path / "none" / "r.json", tmp_path):
        result = run(tmp_path / "m", "--measure", "--json", path)
        assert (result.exit_code, box.started, list(tmp_path.iterdir())) == (2, [], [])
        assert result.stderr == f"tinfer: cannot write {path}\n"


@pytest.mark.parametrize("arguments", [(), ("m", "--size", "1b"), ("m", "--seed", "-1")])
def test_a_mistake_is_code_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def answer(sent_s: float, *chunk_s: float, **fields: Any) -> Outcome:
    return Outcome(
        request_id="r",
        due_s=0.0,
        prompt_tokens=1024,
        asked_tokens=64,
        sent_s=sent_s,
        chunk_s=list(chunk_s),
        output_tokens=len(chunk_s),
        **fields,
    )


def test_the_cost_is_median_over_median() -> None:
    cost = cost_of(
        [
            answer(0.0, 0.3, 0.31, 0.32),
            answer(1.0, 1.2, 1.212, 1.224),
            answer(2.0, 2.9, 2.908, 2.918),
        ]
    )
    assert cost.prefill_ms == pytest.approx(300)
    assert cost.decode_step_ms == pytest.approx(10)
    assert cost.ratio == pytest.approx(30)
    assert cost.ttft_ms == pytest.approx([300, 200, 900])
    assert cost.itl_ms == pytest.approx([10, 12, 9])
    assert (cost.num_repeats, cost.prompt_tokens, cost.output_tokens) == (3, 1024, 3)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (answer(0.0, 0.1, error="refused"), "cannot measure: refused"),
        (answer(0.0, 0.1), "cannot measure: 1 tokens instead of 64"),
    ],
)
def test_no_cost_without_whole_answers(bad: Outcome, words: str) -> None:
    with pytest.raises(StartError, match=words):
        cost_of([answer(0.0, 0.1, 0.2), bad])
