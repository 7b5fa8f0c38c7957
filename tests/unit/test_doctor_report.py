"""What `tinfer doctor` prints and writes, and how it ends; the checks themselves are made up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

import tinfer
import tinfer.doctor.examination
from tinfer.cli import main
from tinfer.cli.doctor import lines_of
from tinfer.doctor import engine
from tinfer.doctor.engine import Imported, check_engine
from tinfer.doctor.examination import Check, Examination, examine
from tinfer.doctor.finding import Finding, fault, ok, warning

FINE = ok("memory", "16 GiB free")
SMALL = warning("/dev/shm", "64 MiB free", "docker run --shm-size 2g")
BROKEN = fault("GPU peers", "2 of 4 work\n   0  1\n0  -  no", "see nvidia-smi")


class Box:
    """The findings of a made-up box, in place of the one at hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.findings: list[Finding] = []
        self.fixes: list[bool] = []
        monkeypatch.setattr(tinfer.doctor.examination, "checks_of_this_box", self._checks)

    def _checks(self, fix: bool) -> list[Check]:
        self.fixes.append(fix)
        return [Check("all", lambda: self.findings)]

    def doctor(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(monkeypatch)


@pytest.mark.parametrize(
    ("findings", "code", "words"),
    [
        ([FINE], 0, "0 faults, 0 warnings"),
        ([FINE, SMALL], 0, "0 faults, 1 warning"),
        ([FINE, SMALL, BROKEN], 1, "1 fault, 1 warning"),
    ],
)
def test_only_faults_make_it_fail(box: Box, findings: list[Finding], code: int, words: str) -> None:
    box.findings = findings
    result = box.doctor()
    assert (result.exit_code, box.fixes) == (code, [False])
    assert result.stdout.splitlines()[-1].startswith(f"{words} in ")


def test_plain_aligned_lines_where_the_output_is_no_terminal(box: Box) -> None:
    box.findings = [FINE, SMALL, BROKEN]
    assert box.doctor().stdout.splitlines()[:-1] == [
        "memory         ok       16 GiB free",
        "/dev/shm       warning  64 MiB free",
        "                        > docker run --shm-size 2g",
        "GPU peers      fault    2 of 4 work",
        "                           0  1",
        "                        0  -  no",
        "                        > see nvidia-smi",
    ]


def test_coloured_and_wrapped_on_a_terminal() -> None:
    long = warning("x", "word " * 30, "do " * 30)
    lines = list(lines_of(long, 80))
    assert click.style("warning  ", fg="yellow") in lines[0]
    plain = [click.unstyle(line) for line in lines]
    assert max(map(len, plain)) <= 80
    assert " ".join(plain).split().count("word") == 30
    assert " ".join(plain).split().count("do") == 30
    assert sum(">" in line for line in plain) == 1


def test_the_report_as_json(box: Box, tmp_path: Path) -> None:
    box.findings = [FINE, BROKEN]
    path = tmp_path / "report.json"
    path.write_text("an older report")
    result = box.doctor("--json", str(path), "--fix")
    assert (result.exit_code, box.fixes) == (1, [True])
    assert "16 GiB free" in result.stdout
    report = msgspec.json.decode(path.read_bytes())
    assert report.keys() == {"version", "findings", "num_warnings", "num_faults", "elapsed_s"}
    assert report["version"] == tinfer.__version__
    assert (report["num_faults"], report["num_warnings"]) == (1, 0)
    assert report["findings"][0] == {
        "check": "memory",
        "level": "ok",
        "found": "16 GiB free",
        "advice": "",
    }
    assert msgspec.convert(report, Examination).findings == box.findings
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_on_standard_output_is_alone_there(box: Box) -> None:
    box.findings = [FINE, SMALL]
    result = box.doctor("--json", "-")
    assert result.exit_code == 0
    assert msgspec.json.decode(result.stdout, type=Examination).findings == box.findings


def test_a_report_that_cannot_be_written_is_said_before_the_checks(
    box: Box, tmp_path: Path
) -> None:
    result = box.doctor("--json", str(tmp_path / "no" / "report.json"))
    assert (result.exit_code, box.fixes) == (2, [])
    assert "--json" in result.stderr


def test_help_describes_the_report() -> None:
    output = CliRunner().invoke(main, ["doctor", "--help"]).output
    assert all(f'"{name}"' in output for name in Examination.__struct_fields__)
    assert all(f'"{name}"' in output for name in Finding.__struct_fields__)
    assert "doctor" in CliRunner().invoke(main, ["--help"]).output


def test_checks_run_beside_each_other_and_report_in_order() -> None:
    """The first can only end once the second runs."""
    started = threading.Event()

    def waits() -> Sequence[Finding]:
        return [FINE] if started.wait(20.0) else []

    def starts() -> Sequence[Finding]:
        started.set()
        return [SMALL, BROKEN]

    checks = [Check("first", waits), Check("second", starts)]
    assert list(examine(checks)) == [FINE, SMALL, BROKEN]


def test_a_check_that_breaks_is_a_fault_and_hides_no_other() -> None:
    def breaks() -> Sequence[Finding]:
        raise KeyError("nvml")

    broken, fine = examine([Check("GPU driver", breaks), Check("memory", lambda: [FINE])])
    assert (broken.check, broken.level) == ("GPU driver", "fault")
    assert "KeyError: 'nvml'" in broken.found
    assert fine == FINE


CPU = Imported(import_s=5.0, torch="2.13.0+cpu", vllm="0.32.0", platform="cpu")
CUDA = Imported(5.0, "2.13.0", "0.32.0", cuda="13.0", platform="cuda", num_gpus=4)


@pytest.mark.parametrize(
    ("imported", "num_gpus", "level", "words"),
    [
        (CPU, 0, "ok", "vLLM 0.32.0 on torch 2.13.0+cpu (CPU build), imported in 5.0 s"),
        (CPU, 2, "warning", "cannot use the 2 GPUs"),
        (CUDA, 4, "ok", "(CUDA 13.0)"),
        (msgspec.structs.replace(CUDA, num_gpus=1), 4, "fault", "torch sees 1 of 4 GPUs"),
        (msgspec.structs.replace(CUDA, num_gpus=0), 0, "fault", "there is no GPU"),
        (msgspec.structs.replace(CPU, vllm="0.31.2"), 0, "fault", "vLLM 0.32"),
        (msgspec.structs.replace(CPU, num_tasks=3), 0, "warning", "3 threads"),
        (Imported(error="ImportError: libgomp"), 0, "fault", "ImportError: libgomp"),
    ],
)
def test_the_engine(imported: Imported, num_gpus: int, level: str, words: str) -> None:
    finding = check_engine(imported, num_gpus)
    assert (finding.check, finding.level) == (engine.CHECK, level)
    assert words in finding.found + finding.advice
    assert bool(finding.advice) == (level != "ok")
