"""The tables of docs/performance.md are what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.performance_tables import written

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"


def test_the_tables_are_those_of_the_results() -> None:
    document = DOCUMENT.read_text()
    assert "<!-- table " in document
    assert written(document, ROOT / "benchmarks" / "results") == document


def test_a_table_is_made_from_its_file(tmp_path: Path) -> None:
    found: dict[str, Any] = {"Mixed": {"rate_rps": 2.0, "arm": None, "probes": []}}
    nothing: dict[str, Any] = {name: [] for name in ("arms", "points", "losses", "wins")}
    result = {**nothing, "unloaded": {}, "slos": {}, "full_load": found}
    (tmp_path / "a.json").write_text(json.dumps(result))
    made = written("x <!-- table a.json full load -->old<!-- end --> y", tmp_path)
    assert "| Mixed | 2.00 | given | 0 |" in made and "old" not in made and made.endswith("y")


def test_costs_are_made_from_their_file(tmp_path: Path) -> None:
    one = {"arm": "relay", "what": "tokens", "mode": "paced", "streams": 1024, "net_front_us": None}
    costs = {"front_us": 9.26, "engines_us": 1.0, "whole_us": 10.26, "tokens_per_s": 12345.6}
    rows = [{**one, **costs, "events_per_token": 1.0, "client_share": 0.25}]
    result = {"kind": "tinfer bench frontend", "rows": rows, "ratios": []}
    (tmp_path / "a.json").write_text(json.dumps(result))
    made = written("<!-- table a.json paced --><!-- end -->", tmp_path)
    assert "| 1,024 | relay | 12,346 | 9.3 | – | 1.0 | 10.3 | 1.00 | 25% |" in made


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCUMENT.read_text())
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target
