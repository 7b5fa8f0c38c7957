"""`tinfer tune` on real vLLM engines."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

from tinfer.tune import store

SMALL = (
    *("--max-chunk", "256", "--max-num-seqs", "4", "--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(48 << 20), "--repeats", "1"),
)


def test_the_built_in_model_on_this_box(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "tinfer", "tune", *SMALL, "--json", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert done.returncode == 0, done.stderr
    tuning = store.read(path)
    assert store.load_for(tuning.identity, tmp_path / "tinfer" / "tune") == tuning
    assert tuning.model == "tinfer-tiny" and "torch" in tuning.versions

    steps = {kind: [p for p in tuning.steps if p.kind == kind] for kind in tuning.fit.errors}
    assert [p.prefill_tokens for p in steps["prefill"]] == [16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert {p.num_decodes for p in steps["decode"]} == {1, 2, 4}
    assert len({p.kv_tokens / p.num_decodes > 100 for p in steps["decode"]}) == 2
    assert all(len(p.samples_s) >= 10 for p in steps["decode"])
    assert steps["later-chunk"] and steps["mixed"]
    assert all(0 < s < math.inf for point in tuning.steps for s in point.samples_s)

    costs = tuning.costs
    assert costs.base_s > 0 and costs.prefill_token_s > 0
    assert tuning.fit.handoff_measured and costs.handoff_s + costs.handoff_token_s > 0
    # The pulls moved exactly the blocks of their prompts.
    block_bytes = tuning.kv.bytes_per_token * tuning.kv.block_tokens
    for point in tuning.handoffs:
        num_blocks = math.ceil(point.tokens / tuning.kv.block_tokens)
        assert point.num_bytes == num_blocks * block_bytes
    assert tuning.kv.kv_bytes <= 48 << 20 and tuning.kv.max_model_len == 1024
    assert 128 <= tuning.chunk.chunk_tokens <= 256
    assert f"chunk     {tuning.chunk.chunk_tokens} tokens" in done.stdout
