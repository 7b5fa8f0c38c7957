"""What `tinfer tune` has measured is taken only for workers that compute as it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.model_box import SMALL, write_model
from tests.unit.test_cli import PLAN
from tests.unit.tune_box import tuning
from tinfer.config import load
from tinfer.core.types import Role
from tinfer.master import tuned
from tinfer.master.model import resolve
from tinfer.master.placement import Placement
from tinfer.master.plan import Decision


@pytest.mark.parametrize(
    ("values", "is_taken"),
    [
        ({}, True),
        ({"max_num_seqs": 4}, True),
        ({"quantization": "fp8"}, False),
        ({"kv_cache_dtype": "fp8"}, False),
        ({"engine_arg": {"load_format": "dummy"}}, False),
    ],
)
def test_other_ways_to_compute_are_not_measured(
    values: dict[str, Any], is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = tuning()
    monkeypatch.setattr(tuned, "load_for", lambda _identity: measured)
    config = load({"model": str(write_model(tmp_path / "m", SMALL)), **values})
    placement = Placement(worker_id="both-0", role=Role.BOTH, device="cpu")
    decision = Decision(PLAN, resolve(config), [placement])
    assert tuned.stored_tuning(config, decision, []) == (measured if is_taken else None)
