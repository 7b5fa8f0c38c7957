"""Real servers on real vLLM, one per kind and session: starting one takes most of a test's time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.serving import ServeProcess, serving
from tinfer.tiny_model.make import ensure_tiny_model


@pytest.fixture(scope="session")
def model_dir() -> str:
    return str(ensure_tiny_model())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> Iterator[ServeProcess]:
    """One prefill and one decode worker; every request is split."""
    folder = tmp_path_factory.mktemp("split")
    arguments = ("--served-model-name", "tiny", "--route", "split", "--log-dir", str(folder))
    with serving(folder, model_dir, *arguments) as process:
        yield process


@pytest.fixture(scope="session")
def whole_server(
    tmp_path_factory: pytest.TempPathFactory, model_dir: str
) -> Iterator[ServeProcess]:
    """Two workers; every request stays on one."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ("--served-model-name", "tiny", "--route", "whole", "--log-dir", str(folder))
    with serving(folder, model_dir, *arguments) as process:
        yield process


@pytest.fixture(scope="session")
def tight_server(
    tmp_path_factory: pytest.TempPathFactory, model_dir: str
) -> Iterator[ServeProcess]:
    """Few seats and little KV memory, so that requests wait in every phase; unknown request fields
    are refused."""
    folder = tmp_path_factory.mktemp("tight")
    memory = ("--max-num-seqs", "24", "--kv-cache-memory-bytes", str(48 << 20))
    arguments = ("--served-model-name", "tiny", "--route", "split", "--strict-params", *memory)
    logs = ("--log-dir", str(folder))
    with serving(folder, model_dir, *arguments, *logs) as process:
        yield process
