"""The work behind bin/setup: check the machine, make .venv, install the pins, leave the stamp.

Standard library only, and run by the Python that the virtual environment will be built on. The
stamp is removed before the first change and written after the last, so a run that was cut off
leaves none; the lock file says "unfinished" until then, and the next run starts from an empty
environment, because a package that was half unpacked cannot be told from a whole one.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

import machine_check
from machine_check import CannotRun

UV = "uv==0.13.8"
# `uv pip sync` of the CUDA build downloads single files of 0.5-1 GB; uv's default is 30 s.
UV_HTTP_TIMEOUT_S = "300"
NUM_STEPS = 6
# Source: measured for cpu; the wheels' sizes added up for cuda.
UNPACKED = {"cpu": "3 GB", "cuda": "10 GB or more"}


class StepFailed(Exception):
    """A command of a step failed; the message is one line for a person."""


@dataclass(frozen=True)
class Plan:
    """What this run has to make; `choice` is "explicit" when the device was named by the user."""

    root: Path
    key: str
    device: str
    choice: str
    dev: bool

    @property
    def venv(self) -> Path:
        """The virtual environment's folder."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """The virtual environment's interpreter."""
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """The file that says that the environment is complete."""
        return self.venv / "tinfer-setup"

    @property
    def stamp_text(self) -> str:
        """The stamp's one line, read by bin/setup."""
        return f"{self.key} {self.device} {int(self.dev)} {self.choice}\n"

    def is_met(self) -> bool:
        """Say whether the stamp on disk already promises all of this."""
        words = self.stamp.read_text().split() if self.stamp.exists() else []
        return words[:2] == [self.key, self.device] and words[2:3] >= [str(int(self.dev))]

    @property
    def requirements(self) -> list[str]:
        """The pin files to install."""
        names = [self.device] + (["dev"] if self.dev else [])
        return [str(self.root / "requirements" / f"{name}.txt") for name in names]


class Progress:
    """Prints numbered steps with the seconds since the start, on standard error."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._num_done = 0

    def step(self, text: str) -> None:
        """Announce the next step."""
        self._num_done += 1
        self.say(f"[{self._num_done}/{NUM_STEPS}] {text}")

    def say(self, text: str) -> None:
        """Print one line with the elapsed time."""
        elapsed_s = time.monotonic() - self._start_s
        print(f"bin/setup {elapsed_s:6.1f} s  {text}", file=sys.stderr, flush=True)


class Shell:
    """Runs commands that keep the lock until they end, even if this process is killed before."""

    def __init__(self, lock: TextIO, device: str) -> None:
        self._lock_fd = lock.fileno()
        self._environment = installer_environment(dict(os.environ), device)

    def run(self, *command: str | Path, quiet: bool = False) -> None:
        """Run one command; raises StepFailed, with its output's last line where `quiet`."""
        words = [str(word) for word in command]
        what = " ".join([Path(words[0]).name, *words[1:3]])
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if quiet else sys.stderr,
                stderr=subprocess.STDOUT if quiet else None,
                text=True,
                env=self._environment,
                pass_fds=[self._lock_fd],
                check=False,
            )
        except OSError as error:
            raise StepFailed(f"{what} cannot be started: {error}") from error
        if done.returncode != 0:
            last = (done.stdout or "").strip().splitlines()[-1:]
            raise StepFailed(": ".join([f"{what} failed ({done.returncode})", *last]))

    def works(self, *command: str | Path) -> bool:
        """Say whether a command succeeds, printing nothing."""
        try:
            self.run(*command, quiet=True)
        except StepFailed:
            return False
        return True


def installer_environment(environment: dict[str, str], device: str) -> dict[str, str]:
    """Return the environment for uv and pip: pip's settings also for uv, uv's own ones first."""
    result = dict(environment)
    # Compiled files go into our own environment, where not having them costs every start seconds.
    for name in ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        result.pop(name, None)
    if device == "cuda":
        # A folder of local wheels may hold torch's CPU build, and torch==2.13.0 allows that one.
        result.pop("PIP_FIND_LINKS", None)
    for uv_name, pip_name in (
        ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"),
        ("UV_INDEX", "PIP_EXTRA_INDEX_URL"),
        ("SSL_CERT_FILE", "PIP_CERT"),
    ):
        if environment.get(pip_name):
            result.setdefault(uv_name, environment[pip_name])
    if environment.get("PIP_EXTRA_INDEX_URL"):
        result.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # pip's way of choosing
    if result.get("PIP_FIND_LINKS"):
        result.setdefault("UV_FIND_LINKS", ",".join(result["PIP_FIND_LINKS"].split()))
    result.setdefault("UV_HTTP_TIMEOUT", UV_HTTP_TIMEOUT_S)
    return result


def make_venv(plan: Plan, shell: Shell, progress: Progress, unfinished: bool) -> None:
    """Create the virtual environment, or keep the one that is there if it is whole and fits."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    probe = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    if not unfinished and plan.python.exists() and shell.works(plan.python, "-c", probe):
        progress.step(f"keeping .venv (Python {version})")
        return
    why = "again, the last run was cut off" if unfinished else f"on {sys.executable}"
    progress.step(f"making .venv {why} (Python {version})")
    if plan.venv.is_symlink():
        plan.venv.unlink()
    shutil.rmtree(plan.venv, ignore_errors=True)
    # The real path: a `python3` link may point to another version tomorrow.
    shell.run(os.path.realpath(sys.executable), "-m", "venv", plan.venv, quiet=True)


def install_packages(plan: Plan, shell: Shell, progress: Progress) -> None:
    """Make the environment hold exactly the pins: by uv, or by pip where uv cannot be had."""
    uv = plan.venv / "bin" / "uv"
    progress.step(f"getting the installer ({UV})")
    pip: list[str | Path] = [plan.python, "-m", "pip", "--disable-pip-version-check"]
    if not shell.works(plan.python, "-m", "pip", "--version"):
        shell.run(plan.python, "-m", "ensurepip", quiet=True)
    have_uv = shell.works(uv, "--version") or shell.works(*pip, "install", "--quiet", UV)
    size = UNPACKED[plan.device]
    progress.step(f"installing torch, vLLM and what they need for {plan.device} ({size} unpacked)")
    if not have_uv:
        progress.say("uv cannot be had here; pip does it, which takes several times as long")
        files = [word for name in plan.requirements for word in ("-r", name)]
        shell.run(*pip, "install", "--no-deps", *files)
        return
    sync: list[str | Path] = [uv, "pip", "sync", "--python", plan.python, *plan.requirements]
    if plan.device == "cpu" and not shell.works(*sync, "--dry-run"):
        progress.say("torch's CPU build is not in the configured index; asking PyTorch's own")
        sync += ["--torch-backend", "cpu"]
    # On a terminal uv draws how far it is; elsewhere all it would add is a line per package.
    shell.run(*sync, *([] if sys.stderr.isatty() else ["--quiet"]))


def install_tinfer(plan: Plan, shell: Shell, progress: Progress) -> None:
    """Install this checkout in editable form, then see that what was installed can be imported."""
    progress.step("installing tinfer from this checkout (editable)")
    uv = plan.venv / "bin" / "uv"
    pip: list[str | Path] = [uv, "pip"] if uv.exists() else [plan.python, "-m", "pip"]
    where: list[str | Path] = ["--python", plan.python] if uv.exists() else []
    shell.run(*pip, "install", *where, "--quiet", "--no-deps", "--editable", plan.root)
    progress.step("importing torch and vLLM once (compiles their Python files)")
    # The very imports of `tinfer serve`: without compiled files they take three times as long.
    code = "from tinfer.worker.preload import preload; preload()"
    shell.run(plan.python, "-P", "-c", code, quiet=True)


def build(plan: Plan, lock: TextIO, progress: Progress) -> None:
    """Run every step; leaves the stamp only when all have succeeded."""
    unfinished = bool(lock.read())
    progress.step(f"checking this machine for {plan.device}")
    installed = not unfinished and any(plan.venv.glob("lib/python*/site-packages/torch"))
    for note in machine_check.check(plan.device, plan.root, installed):
        progress.say(note)
    plan.stamp.unlink(missing_ok=True)
    lock.seek(0)
    lock.write("unfinished\n")
    lock.flush()
    shell = Shell(lock, plan.device)
    make_venv(plan, shell, progress, unfinished)
    install_packages(plan, shell, progress)
    install_tinfer(plan, shell, progress)
    lock.truncate(0)
    new = plan.stamp.with_suffix(".new")
    new.write_text(plan.stamp_text)
    new.replace(plan.stamp)
    progress.say("done: bin/tinfer is ready")


def take_lock(root: Path, progress: Progress) -> TextIO:
    """Wait until no other bin/setup works on this checkout; returns the open, locked file.

    Raises `CannotRun` where this user may not write into the checkout.
    """
    try:
        lock = open(root / ".setup.lock", "a+")
    except PermissionError as error:
        owner = root.stat().st_uid
        raise CannotRun(
            f".venv is not ready for this user, who may not write to {root} (user {owner}'s): "
            "have its owner run bin/setup, or clone a copy of your own"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.say("another bin/setup is at work here; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.seek(0)
    return lock


def parse_arguments() -> Plan:
    """Read the arguments that bin/setup passes; detects the device where it says auto."""
    parser = argparse.ArgumentParser(prog="bin/setup")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], required=True)
    parser.add_argument("--choice", choices=["auto", "explicit"], required=True)
    parser.add_argument("--dev", action="store_true")
    given = parser.parse_args()
    device = machine_check.detect_device() if given.device == "auto" else given.device
    return Plan(given.root, given.key, device, given.choice, given.dev)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Turn SIGTERM into the exception that also ends the running command."""
    raise KeyboardInterrupt


def main() -> int:
    """Return 0 when .venv is complete, 2 when this machine cannot, 1 when a step failed."""
    signal.signal(signal.SIGTERM, interrupt)
    progress = Progress()
    try:
        plan = parse_arguments()
        with take_lock(plan.root, progress) as lock:
            if plan.is_met():
                progress.say("done by the other one")
                return 0
            build(plan, lock, progress)
    except CannotRun as error:
        print(f"bin/setup: {error}", file=sys.stderr)
        return 2
    except (StepFailed, OSError) as error:
        print(f"bin/setup: {error}; nothing is lost, run it again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bin/setup: interrupted; the next run repairs it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
