"""Real servers on real vLLM, one per kind and session: starting one takes most of a test's time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import ServeProcess, serving
from tests.random_model import EXACT, make_random_model
from tinfer.master.host_cpu import halves_are_slow
from tinfer.tiny_model import MODEL_DIR

TEMP = pytest.TempPathFactory
TIGHT = (
    *("--max-num-seqs", "24", "--kv-cache-memory-bytes", str(48 << 20)),
    *("--max-model-len", "16384", "--strict-params"),
)
# Without AVX-512 a CPU computes bfloat16, the built-in model's type, many times slower.
QUICK = EXACT if halves_are_slow() else ()


@pytest.fixture(scope="session")
def model_dir() -> str:
    """The built-in model, which answers what was asked."""
    return str(MODEL_DIR)


@pytest.fixture(scope="session")
def random_model_dir(tmp_path_factory: TEMP) -> str:
    """A model whose every token depends on its whole prompt, for comparisons of any prompt."""
    folder = tmp_path_factory.mktemp("random-model")
    make_random_model(folder)
    return str(folder)


def _serving(folder: Path, model: str, route: str, *more: str) -> Iterator[ServeProcess]:
    names = ("--served-model-name", "tiny", "--route", route, "--log-dir", str(folder))
    # With one thread, results do not depend on what else is in the batch.
    threads = ("--cpu-threads", "1")
    with serving(folder, model, *names, *threads, *more) as process:
        yield process


@pytest.fixture(scope="session")
def server(tmp_path_factory: TEMP, model_dir: str) -> Iterator[ServeProcess]:
    """One prefill and one decode worker; every request is split."""
    yield from _serving(tmp_path_factory.mktemp("split"), model_dir, "split", *QUICK)


@pytest.fixture(scope="session")
def whole_server(tmp_path_factory: TEMP, model_dir: str) -> Iterator[ServeProcess]:
    """Two workers; every request stays on one."""
    yield from _serving(tmp_path_factory.mktemp("whole"), model_dir, "whole", *QUICK)


@pytest.fixture(scope="session")
def random_server(tmp_path_factory: TEMP, random_model_dir: str) -> Iterator[ServeProcess]:
    """As `server`, with the random model."""
    yield from _serving(tmp_path_factory.mktemp("random-split"), random_model_dir, "split", *EXACT)


@pytest.fixture(scope="session")
def random_whole_server(tmp_path_factory: TEMP, random_model_dir: str) -> Iterator[ServeProcess]:
    """As `whole_server`, with the random model."""
    yield from _serving(tmp_path_factory.mktemp("random-whole"), random_model_dir, "whole", *EXACT)


@pytest.fixture(scope="session")
def tight_server(tmp_path_factory: TEMP, random_model_dir: str) -> Iterator[ServeProcess]:
    """Few seats and little KV memory, so that requests wait in every phase; unknown request fields
    are refused. The random model's answers rarely end by themselves."""
    yield from _serving(tmp_path_factory.mktemp("tight"), random_model_dir, "split", *EXACT, *TIGHT)
