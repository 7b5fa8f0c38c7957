"""bin/setup: nothing to do when nothing changed, choices stick, an interrupted run is repaired."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import install
import machine_check
import pytest
from install import Plan, Progress, StepFailed

ROOT = Path(__file__).resolve().parents[2]
# Stands in for install.py: notes its arguments, leaves an environment and the stamp.
STUB = """
import os, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
root, dev = Path(given["--root"]), "--dev" in sys.argv
device = "cpu" if given["--device"] == "auto" else given["--device"]
(root / "calls").open("a").write(f"{given['--device']} {int(dev)}\\n")
(root / ".venv/bin").mkdir(parents=True, exist_ok=True)
if not (root / ".venv/bin/python").exists():
    os.symlink(os.environ["FAKE_PYTHON"], root / ".venv/bin/python")
stamp = f"{given['--key']} {device} {int(dev)} {given['--choice']}\\n"
(root / ".venv/tinfer-setup").write_text(stamp)
"""


class Checkout:
    """A copy of the repository's scripts whose install.py is the stub."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("bin", "requirements"):
            shutil.copytree(ROOT / folder, root / folder)
        shutil.copy(ROOT / "pyproject.toml", root)
        (root / "bin/lib/install.py").write_text(STUB)

    def run(
        self,
        script: str,
        *arguments: str,
        path: str = "/usr/bin:/bin",
        python: str = sys.executable,
    ) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": path, "FAKE_PYTHON": "/bin/echo", "TINFER_PYTHON": python}
        return subprocess.run(
            [script, *arguments],
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def setup(self, *arguments: str) -> str:
        """Run bin/setup and return what it asked the installer for: "", or "DEVICE DEV"."""
        calls = self.root / "calls"
        calls.write_text("")
        done = self.run(str(self.root / "bin/setup"), *arguments)
        assert done.returncode == 0, done.stderr
        return calls.read_text().strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a folder")


def test_second_run_has_nothing_to_do(checkout: Checkout) -> None:
    assert checkout.setup() == "auto 0"
    assert checkout.setup() == ""
    assert checkout.setup("--quiet") == ""


def test_a_changed_pin_or_a_lost_interpreter_is_work(checkout: Checkout) -> None:
    checkout.setup()
    with open(checkout.root / "requirements/cpu.txt", "a") as pins:
        pins.write("extra==1\n")
    assert checkout.setup() == "auto 0"
    (checkout.root / ".venv/bin/python").unlink()
    assert checkout.setup() == "auto 0"
    (checkout.root / ".venv/tinfer-setup").unlink()
    assert checkout.setup() == "auto 0"
    assert checkout.setup() == ""


def test_choices_stay(checkout: Checkout) -> None:
    assert checkout.setup("--device", "cuda") == "cuda 0"
    assert checkout.setup() == ""
    assert checkout.setup("--dev") == "cuda 1"
    assert checkout.setup("--device", "cuda") == ""
    assert checkout.setup("--device", "cpu") == "cpu 1"
    assert checkout.setup("--device", "auto") == "auto 1"
    assert checkout.setup() == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "banana"), "--device is auto, cpu or cuda, not banana"),
        (("--device",), "--device needs a value"),
        (("--fast",), "unknown option --fast"),
    ],
)
def test_mistakes_end_in_one_line(checkout: Checkout, arguments: Sequence[str], said: str) -> None:
    done = checkout.run(str(checkout.root / "bin/setup"), *arguments)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_python_is_one_line(checkout: Checkout, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "cat", "sha256sum"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    script = str(checkout.root / "bin/setup")
    done = checkout.run(script, path=str(tools), python="")
    assert done.returncode == 2
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr and done.stderr.count("\n") == 1
    done = checkout.run(script, "--python", "/nonexistent")
    assert done.returncode == 2
    assert "/nonexistent is not a Python 3.11 to 3.13" in done.stderr


def test_bin_tinfer_works_through_a_link_from_anywhere(checkout: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "tinfer"
    link.symlink_to(checkout.root / "bin/tinfer")
    done = checkout.run(str(link), "serve", "a b")
    assert (done.returncode, done.stdout) == (0, "-P -m tinfer serve a b\n")
    assert (checkout.root / "calls").read_text() == "auto 0\n"


class FakeShell:
    """Runs nothing; the venv command makes the folder, and `fail_at` names a command to fail."""

    fail_at = ""

    def __init__(self, *_: object) -> None:
        pass

    def run(self, *command: str | Path, quiet: bool = False) -> None:
        words = [str(word) for word in command]
        if "venv" in words:
            Path(words[-1], "bin").mkdir(parents=True)
            Path(words[-1], "bin/python").touch()
            Path(words[-1], "bin/uv").touch()
        if self.fail_at and self.fail_at in words:
            raise StepFailed(f"{self.fail_at} failed")

    def works(self, *_: str | Path) -> bool:
        return True


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(install, "Shell", FakeShell)
    monkeypatch.setattr(machine_check, "check", lambda *_: [])
    return Plan(tmp_path, "key", "cpu", "auto", dev=True)


def build(plan: Plan) -> None:
    progress = Progress()
    with install.take_lock(plan.root, progress) as lock:
        install.build(plan, lock, progress)


@pytest.mark.parametrize("step", ["venv", "sync", "--editable", "-c"])
def test_an_interrupted_run_leaves_no_stamp_and_is_repaired(
    plan: Plan, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeShell, "fail_at", step)
    with pytest.raises(StepFailed):
        build(plan)
    assert not plan.is_met()
    half = plan.venv / "half-unpacked"
    half.touch()
    monkeypatch.setattr(FakeShell, "fail_at", "")
    build(plan)
    assert plan.is_met() and not half.exists()
    assert (plan.root / ".setup.lock").read_text() == ""


def test_a_failed_update_forgets_the_old_stamp(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    build(plan)
    monkeypatch.setattr(FakeShell, "fail_at", "sync")
    with pytest.raises(StepFailed):
        build(plan)
    assert not plan.stamp.exists()


def test_a_whole_environment_is_kept(plan: Plan) -> None:
    build(plan)
    mine = plan.venv / "mine"
    mine.touch()
    build(plan)
    assert mine.exists()


def test_the_stamp_of_a_dev_environment_covers_a_plain_one(plan: Plan) -> None:
    build(plan)
    assert Plan(plan.root, "key", "cpu", "auto", dev=False).is_met()
    assert not Plan(plan.root, "other", "cpu", "auto", dev=True).is_met()
    assert not Plan(plan.root, "key", "cuda", "auto", dev=True).is_met()


def test_uv_follows_pips_settings() -> None:
    pip = {"PIP_INDEX_URL": "file:///a", "PIP_FIND_LINKS": "/x /y", "PYTHONPATH": "/z"}
    cpu = install.installer_environment(pip, "cpu")
    assert cpu["UV_DEFAULT_INDEX"] == "file:///a"
    assert cpu["UV_FIND_LINKS"] == "/x,/y"
    assert "PYTHONPATH" not in cpu
    cuda = install.installer_environment(pip, "cuda")
    assert "UV_FIND_LINKS" not in cuda and "PIP_FIND_LINKS" not in cuda
    mine = install.installer_environment({**pip, "UV_DEFAULT_INDEX": "file:///mine"}, "cpu")
    assert mine["UV_DEFAULT_INDEX"] == "file:///mine"


def test_a_command_that_fails_is_named_in_one_line(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock:
        shell = install.Shell(lock, "cpu")
        with pytest.raises(StepFailed, match=r"^sh -c .* failed \(3\): last$"):
            shell.run("sh", "-c", "echo first; echo last; exit 3", quiet=True)
        with pytest.raises(StepFailed, match="cannot be started"):
            shell.run("/nonexistent/uv")
        assert shell.works("true") and not shell.works("false")


def test_a_checkout_of_another_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(install, "open", denied, raising=False)
    with pytest.raises(machine_check.CannotRun, match=r"may not write to .*clone a copy"):
        install.take_lock(tmp_path, Progress())
