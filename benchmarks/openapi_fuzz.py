"""Schemathesis on the server's own OpenAPI document, against a running server of the fake engine.

Every operation gets the cases of schemathesis' coverage phase (each bound, each type, each field
left out) and a number of random ones that the document allows or forbids. Wanted: no 5xx, no answer
later than the deadline, every answer as described, everything that is forbidden refused, and
afterwards a ledger of zeros and the same processes as before. Not asked of schemathesis is that all
that is allowed be accepted: a document says nothing of contradictions between fields, nor of the
limits of the model.

Needs schemathesis, which is not in requirements/: install tinfer's extra `fuzz` into .venv.

    python -m benchmarks.openapi_fuzz --max-examples 300 --json openapi_fuzz.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.e2e.serving import serving, until_idle

HANG_S = 20.0
HEADERS = ("Content-Type", "X-Tinfer-Trace", "X-Request-Id")
# Checks that ask for what the document does not promise, or for what the server does not have.
NOT_ASKED = ("positive_data_acceptance",)
PHASES = ("coverage", "fuzzing")
FLAGS = ("--engine", "fake", "--route", "split", "--fake-engine", "max_model_len=256")


def run(url: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of schemathesis; its report, put together per operation."""
    events, out = folder / "events.ndjson", folder / "schemathesis.out"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--seed", str(arguments.seed), "--max-examples", str(arguments.max_examples)),
        *("--phases", ",".join(PHASES), "--mode", "all", "--checks", "all"),
        *("--exclude-checks", ",".join(NOT_ASKED), "--request-timeout", str(HANG_S)),
        *("--continue-on-failure", "--generation-database", "none", "--no-color"),
        *("--report-ndjson-path", str(events)),
    ]
    for path in arguments.path or ():
        command += ["--include-path", path]
    began_s = time.monotonic()
    with out.open("wb") as sink:
        status = subprocess.run(command, stdout=sink, stderr=sink, cwd=folder, check=False)
    if not events.exists():
        raise SystemExit(out.read_text())
    return {
        "exit_code": status.returncode,
        "wall_s": round(time.monotonic() - began_s, 1),
        **summed(read(events)),
    }


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The finished scenarios of a report: one operation in one phase each, or a part of it."""
    with path.open() as file:
        for line in file:
            event = json.loads(line)
            if "NonFatalError" in event or "FatalError" in event:
                yield event
            elif "ScenarioFinished" in event:
                yield event["ScenarioFinished"]


def summed(scenarios: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Cases, statuses and the slowest answer per operation, and every check that failed."""
    operations: dict[str, dict[str, Any]] = {}
    findings: list[dict[str, Any]] = []
    for scenario in scenarios:
        recorder = scenario.get("recorder")
        if recorder is None:
            findings.append({"error": scenario})
            continue
        empty = {"cases": Counter(), "statuses": Counter(), "checks": 0, "slowest_s": 0.0}
        seen = operations.setdefault(recorder["label"], empty)
        seen["cases"][scenario["phase"]] += len(recorder["cases"])
        for case_id, sent in recorder["interactions"].items():
            answer = sent.get("response")
            status = "none" if answer is None else str(answer["status_code"])
            seen["statuses"][status] += 1
            if answer is None:
                findings.append({"operation": recorder["label"], "no_answer": shown(sent)})
            else:
                seen["slowest_s"] = max(seen["slowest_s"], round(answer["elapsed"], 3))
            for check in recorder["checks"].get(case_id, []):
                seen["checks"] += 1
                if check["status"] == "failure":
                    why = check["failure_info"]["failure"]["message"]
                    finding = {"check": check["name"], "why": why, "request": shown(sent)}
                    findings.append({"operation": recorder["label"], **finding})
    total = sum(sum(one["cases"].values()) for one in operations.values())
    statuses: Counter[str] = sum((one["statuses"] for one in operations.values()), Counter())
    return {
        "num_cases": total,
        "num_5xx": sum(count for status, count in statuses.items() if status.startswith("5")),
        "num_without_answer": statuses["none"],
        "operations": dict(sorted(operations.items())),
        "findings": findings,
    }


def shown(sent: dict[str, Any]) -> dict[str, Any]:
    """A request as a person reads it: nulls mean nothing, and most of a body is null."""
    request = sent["request"]
    encoded = (request.get("body") or {}).get("$base64", "")
    body: Any = base64.b64decode(encoded).decode(errors="replace")
    with contextlib.suppress(ValueError):
        body = json.loads(body)
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if value is not None}
    headers = {name: value for name, value in request["headers"].items() if name in HEADERS}
    return {"method": request["method"], "uri": request["uri"], "headers": headers, "body": body}


def family(pid: int) -> list[int]:
    """The server's processes, by their parents in /proc."""
    found = [pid]
    for parent in found:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        found += [int(child) for child in children]
    return sorted(found)


def ledger(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/debug/ledger") as answer:
        said: dict[str, Any] = json.load(answer)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max-examples", type=int, default=300, help="per operation and phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", action="append", help="only this path; repeatable")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="openapi-fuzz-") as folder:
        with serving(Path(folder), *FLAGS) as server:
            before = family(server.process.pid)
            result = run(server.url, Path(folder), arguments)
            asyncio.run(until_idle(server.url))
            after = {
                "same_processes": family(server.process.pid) == before,
                "ledger": ledger(server.url),
            }
    words = f"--max-examples {arguments.max_examples} --seed {arguments.seed}"
    report = {
        "benchmark": "openapi_fuzz",
        "command": f"python -m benchmarks.openapi_fuzz {words}",
        "server": " ".join(("tinfer serve", *FLAGS)),
        "seed": arguments.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("schemathesis", "hypothesis", "aiohttp")},
        },
        "cores": os.cpu_count(),
        "hang_s": HANG_S,
        "checks_not_asked": NOT_ASKED,
        **result,
        "after": after,
    }
    for name, seen in report["operations"].items():
        print(f"{name:<30} {dict(seen['cases'])} {dict(seen['statuses'])} {seen['slowest_s']} s")
    for finding in report["findings"]:
        print(json.dumps(finding))
    print(f"{report['num_cases']} cases, {len(report['findings'])} findings, {after}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if report["findings"] or report["num_5xx"] or not after["same_processes"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
