"""A plain vLLM engine in a process of its own, to compare with (`tests.e2e.reference_engine`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any


class PlainEngine:
    """Started once, asked as often as need be; a context manager. One thread computes."""

    def __init__(self, model_dir: str, dtype: str = "auto") -> None:
        # What vLLM leaves in the temporary directory when it is killed goes with this one.
        self.folder = tempfile.mkdtemp(prefix="plain-engine-")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.reference_engine", model_dir, dtype],
            env={
                **os.environ,
                "TMPDIR": self.folder,
                "OMP_NUM_THREADS": "1",
                "VLLM_LOGGING_LEVEL": "ERROR",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(self, cases: Sequence[dict[str, Any]]) -> list[Any]:
        """What it answers to each (`prompt` as token ids, `params`), all asked at once."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(cases) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self._said()
        answers: list[Any] = json.loads(line)
        return answers

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.communicate()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> PlainEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
