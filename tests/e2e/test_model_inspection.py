"""A worker that meets a model for the first time starts no second interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os
from vllm.model_executor.models import registry
from tinfer.worker.model_inspection import inspect_in_this_process
inspect_in_this_process()
print(registry._run_in_subprocess(os.getpid) == os.getpid())
"""


def test_inspection_stays_in_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.stdout.strip().endswith("True"), done.stderr[-2000:]
