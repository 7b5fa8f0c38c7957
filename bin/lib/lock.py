"""Write requirements/{cpu,cuda,dev}.txt: the exact pins that bin/setup installs.

Resolves pyproject.toml with uv for every platform, then keeps what Linux on x86_64 and aarch64 with
CPython 3.11 to 3.13 needs, so one file serves all of them. The outputs hold no index line, no host
and no local path: where packages come from is the business of the machine that installs them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
HEADER = "# Exact pins, written by bin/lock: change pyproject.toml and run it again.\n"
# Package name to its pin lines: several where the version depends on the machine or the Python.
Pins = dict[str, list[str]]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_31"
TARGETS = [
    {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    for machine in ("x86_64", "aarch64")
    for python in PYTHONS
]


class LockError(Exception):
    """The resolution failed or its result cannot be used; the message is for a person."""


def find_uv() -> str:
    """Return the uv of this virtual environment, else the one on PATH."""
    here = str(Path(sys.executable).parent)
    uv = shutil.which("uv", path=here + os.pathsep + os.environ.get("PATH", ""))
    if uv is None:
        raise LockError("bin/lock needs uv: run bin/setup first")
    return uv


def resolve(
    extra: str,
    preferred: Iterable[str],
    local_wheels: bool = False,
    constraints: Path | None = None,
) -> Pins:
    """Resolve one extra of pyproject.toml; the `preferred` pin lines are kept where they fit.

    The universal resolution reads the dependencies of one wheel per package; where a package lists
    other ones on Linux (intel-openmp does) the second, platform-exact resolution adds them.
    """
    command = ["--extra", extra]
    if constraints is not None:
        command += ["--constraint", str(constraints)]
    if local_wheels and os.environ.get("PIP_FIND_LINKS"):
        command += ["--find-links", os.environ["PIP_FIND_LINKS"]]
    universal = compile_pins([*command, "--universal"], preferred)
    exact = compile_pins([*command, "--python-platform", PLATFORM], universal)
    pins = keep_for_targets(universal)
    for name, found in keep_for_targets(exact).items():
        pins.setdefault(name, [f'{pin} ; platform_machine == "x86_64"' for pin in found])
    return pins


def compile_pins(options: list[str], preferred: Iterable[str]) -> list[str]:
    """Run `uv pip compile` on pyproject.toml and return its requirement lines."""
    with tempfile.TemporaryDirectory(prefix="lock-") as work:
        out = Path(work) / "pins.txt"
        out.write_text("\n".join(preferred))
        command = [find_uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--python-version", PYTHONS[0], *options, "--output-file", str(out)]
        command += ["pyproject.toml"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LockError(done.stderr.strip() or "uv pip compile failed")
        return lines(out)


def lines(path: Path) -> list[str]:
    """Return the requirement lines of a pins file, without comments and options."""
    return [text for text in path.read_text().splitlines() if text and text[0] not in "#-"]


def keep_for_targets(resolved: list[str]) -> Pins:
    """Keep what some target installs; a marker that is true on every target is dropped."""
    kept: Pins = {}
    for line in resolved:
        requirement = Requirement(line)
        marker = requirement.marker
        hits = [marker is None or marker.evaluate(dict(target)) for target in TARGETS]
        if any(hits):
            pin = f"{requirement.name}{requirement.specifier}"
            text = pin if all(hits) else f"{pin} ; {marker}"
            kept.setdefault(requirement.name, []).append(text)
    return kept


def dev_additions(dev: Pins, cpu: Pins, cuda: Pins) -> Pins:
    """Return what `dev` adds to both device files; refuses a pin that contradicts one of them."""
    for device, base in (("cpu", cpu), ("cuda", cuda)):
        for name, pins in dev.items():
            if base.get(name, pins) != pins:
                raise LockError(f"dev wants {pins}, requirements/{device}.txt has {base[name]}")
    return {name: pins for name, pins in dev.items() if not (name in cpu and name in cuda)}


def write(path: Path, pins: Pins) -> None:
    """Write one requirements file, sorted by package name."""
    path.write_text(HEADER + "".join(f"{line}\n" for name in sorted(pins) for line in pins[name]))
    print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


def main() -> int:
    """Resolve and write all three files; exit status 1 and one message when that fails."""
    parser = argparse.ArgumentParser(prog="bin/lock", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="move every pin to its newest")
    upgrade = parser.parse_args().upgrade
    folder = ROOT / "requirements"
    try:
        old = {path.stem: [] if upgrade else lines(path) for path in folder.glob("*.txt")}
        cpu = resolve("cpu", old.get("cpu", []), local_wheels=True)
        # No local wheels: their CPU build of torch would satisfy torch==2.13.0 as well. What both
        # devices use is steered to one version, so that dev.txt fits on top of either.
        shared = [line for pins in cpu.values() for line in pins]
        cuda = resolve("cuda", shared + old.get("cuda", []))
        write(folder / "cpu.txt", cpu)
        write(folder / "cuda.txt", cuda)
        dev = resolve("dev", old.get("dev", []), constraints=folder / "cpu.txt")
        write(folder / "dev.txt", dev_additions(dev, cpu, cuda))
    except LockError as error:
        print(f"bin/lock: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
