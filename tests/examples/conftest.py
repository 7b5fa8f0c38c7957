"""One real server of the fake engine for all examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.serving import ServeProcess, serving
from tests.process.load import fake_flags


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """Answers go on until their client's limit, at a token per step of a few milliseconds."""
    folder = tmp_path_factory.mktemp("examples")
    flags = fake_flags({"mean_output_tokens": 1_000_000, "step_s": 0.005}, log_dir=folder)
    with serving(folder, *flags) as process:
        yield process
