"""The leak check sees each kind of leak, and what is owned does not count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leaks import MARK, SHM, LeakBaseline

WAIT_FOR_EOF = "import sys; sys.stdin.read()"
ORPHAN = (
    "import subprocess, sys\n"
    f"child = subprocess.Popen([sys.executable, '-c', {WAIT_FOR_EOF!r}], stdout=2)\n"
    "print(child.pid)\n"
)


@pytest.fixture
def baseline(tmp_path: Path) -> LeakBaseline:
    baseline = LeakBaseline(tmp_path, grace_s=0.0)
    baseline.rebase()
    return baseline


def test_nothing_new_is_no_leak(baseline: LeakBaseline) -> None:
    assert baseline.leaks() == []


def test_an_open_descriptor_is_named(baseline: LeakBaseline) -> None:
    with open(os.devnull) as file:
        assert baseline.leaks() == [f"descriptor {file.fileno()}: {file.name}"]
    assert baseline.leaks() == []


def test_a_temporary_file_is_named_unless_owned(baseline: LeakBaseline, tmp_path: Path) -> None:
    folder, file = tmp_path / "tinfer-x", tmp_path / "vllm_dist_x"
    folder.mkdir()
    file.touch()
    (tmp_path / "torchinductor_me").mkdir()
    assert baseline.leaks() == [f"path {folder}", f"path {file}"]
    baseline.own_path(folder)
    assert baseline.leaks() == [f"path {file}"]


def test_shared_memory_is_named(baseline: LeakBaseline) -> None:
    path = SHM / MARK[-20:]
    path.touch()
    try:
        assert baseline.leaks() == [f"path {path}"]
    finally:
        path.unlink()


def test_shared_memory_of_a_stranger_is_not_ours(baseline: LeakBaseline) -> None:
    path = SHM / MARK[-19:]
    name, _, _ = MARK.partition("=")
    code = f"import os, sys\nos.open({str(path)!r}, os.O_CREAT | os.O_RDWR)\nprint(flush=True)\n"
    clean = {key: value for key, value in os.environ.items() if key != name}
    # A grandchild whose parent is gone and that carries no mark looks like anyone's process.
    starter = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code + WAIT_FOR_EOF!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starter],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.wait()
        process.stdout.readline()
        try:
            assert not [leak for leak in baseline.leaks() if str(path) in leak]
        finally:
            path.unlink()


def test_a_child_is_named_unless_owned(baseline: LeakBaseline) -> None:
    with subprocess.Popen([sys.executable, "-c", WAIT_FOR_EOF], stdin=subprocess.PIPE) as process:
        leaks = [leak for leak in baseline.leaks() if leak.startswith("process")]
        assert leaks == [f"process {process.pid}: {sys.executable} -c {WAIT_FOR_EOF}"]
        baseline.own_process(process.pid)
        assert not [leak for leak in baseline.leaks() if leak.startswith("process")]


def test_an_orphan_is_recognised(baseline: LeakBaseline) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        process.wait()
        assert any(leak.startswith(f"process {orphan}:") for leak in baseline.leaks())
