"""Imports point one way: which part of tinfer may use which other part, and which library.

    master -> {api, wire, predict, workloads} -> core        worker -> {wire, core}
    sim -> {core, predict, workloads}             bench -> {client, core, workloads}

Every import counts, those inside functions and under TYPE_CHECKING too; only for `cli` the ones
that run at import time are told apart, because `tinfer --help` must not wait for anything heavy.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# No part of tinfer below them; every part may use them.
LEAVES = {
    "atomic_file",
    "cgroup",
    "clock",
    "engine_args",
    "errors",
    "slo",
    "tiny_model",
    "unix_socket",
}
MAY_USE = {
    "core": set[str](),
    "wire": {"core"},
    "api": {"core"},
    "predict": {"core"},
    "config": set[str](),
    "client": set[str](),
    "own_server": set[str](),
    "chat": {"client", "own_server"},
    "batch": {"client", "own_server"},
    "offline": {"client", "own_server", "config"},
    "admin": {"client"},
    "top": {"client"},
    "workloads": {"core"},
    "worker": {"wire", "core", "config"},
    # Of the workloads only the request log's records.
    "master": {"api", "wire", "core", "predict", "tune", "config", "workloads"},
    # Of the master only what tells which runs and cores there are; it starts nothing.
    "doctor": {"master", "wire", "core", "config"},
    # What was measured, for server and simulator to read; who measures runs workers by the master.
    "tune": {"core"},
    "tuner": {"tune", "master", "wire", "core", "config"},
    "sim": {"core", "predict", "workloads", "config"},
    "bench": {"client", "core", "workloads", "config"},
    **{leaf: set[str]() for leaf in LEAVES},
}
# The command line and `python -m tinfer` tie everything together.
ENTRY = {"cli", "__main__", "__init__"}
CLI_AT_IMPORT = {"click", "msgspec", "tinfer.cli", "tinfer.clock", "tinfer.config", "tinfer.errors"}
CLI_AT_IMPORT |= {"tinfer.engine_args"}
VERSION = "tinfer.__version__"
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}
VLLM_OUTSIDE_WORKER = {"tinfer.api.vllm_parsers"}
# Run by hand, imported by nothing else.
TORCH_OUTSIDE_WORKER = {f"tinfer.tiny_model.{name}" for name in ("train", "attention", "precision")}
# Loaded on their own in a fresh interpreter: what serves HTTP and decides must not load engines.
WITHOUT_ENGINE = [
    "tinfer.cli",
    "tinfer.core.scheduler",
    "tinfer.api.server",
    "tinfer.master.app",
    "tinfer.doctor.examination",
    "tinfer.tune.store",
    "tinfer.tuner.app",
    "tinfer.workloads",
    "tinfer.predict.predictors",
    "tinfer.predict.online",
    "tinfer.sim.cluster",
    "tinfer.bench.app",
    "tinfer.bench.compare.app",
    "tinfer.batch.app",
    "tinfer.offline",
    "tinfer.top.app",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "tinfer").rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every imported name, `from a import b` as a.b; relative imports are an error."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_import_time(tree: ast.Module) -> Iterator[str]:
    """Yield what the module imports when it is itself imported."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not type_only:
            yield from imported(node)


def part_of(module: str) -> str:
    """Return the part of tinfer a module belongs to: `tinfer.core.types` is in `core`."""
    return module.split(".")[1] if "." in module else "__init__"


def breaches(module: str, tree: ast.Module) -> list[str]:
    """Return the imports that `module` may not have."""
    part = part_of(module)
    libraries = {name for name in imported(tree) if not name.startswith("tinfer.")}
    roots = {name.split(".")[0] for name in libraries}
    found = sorted(roots & PICKLES)
    if part not in ENTRY:
        allowed = MAY_USE[part] | LEAVES | {part} if part not in LEAVES | {"core"} else {part}
        uses = {name for name in imported(tree) if name.startswith("tinfer.")} - {VERSION}
        found += sorted(name for name in uses if part_of(name) not in allowed)
    if part == "core":
        found += sorted(roots - sys.stdlib_module_names - {"msgspec", "tinfer"})
    in_worker = part == "worker"
    in_kv = module.startswith("tinfer.worker.kv")
    if "vllm" in roots and (not in_worker or in_kv) and module not in VLLM_OUTSIDE_WORKER:
        found.append("vllm")
    if "torch" in roots and not in_worker and module not in TORCH_OUTSIDE_WORKER:
        found.append("torch")
    if part == "cli":
        known = (*CLI_AT_IMPORT, *sys.stdlib_module_names)
        found += [
            f"{name} (at import time)"
            for name in imported_at_import_time(tree)
            if not any(name == root or name.startswith(f"{root}.") for root in known)
        ]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_the_contract(module: str) -> None:
    assert part_of(module) in MAY_USE.keys() | ENTRY, "a new part: give it a row in MAY_USE"
    assert breaches(module, ast.parse(MODULES[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("tinfer.core.types", "import msgspec, heapq", []),
        ("tinfer.core.types", "import numpy", ["numpy"]),
        ("tinfer.core.types", "from tinfer.errors import X", ["tinfer.errors.X"]),
        ("tinfer.wire.links", "from tinfer.core import types", []),
        ("tinfer.wire.links", "def f():\n    import pickle", ["pickle"]),
        ("tinfer.master.app", "from tinfer.worker import engine", ["tinfer.worker.engine"]),
        ("tinfer.worker.engine", "import vllm, torch, tinfer.wire.links", []),
        ("tinfer.worker.engine", "import tinfer.master.app", ["tinfer.master.app"]),
        ("tinfer.worker.kv.shm", "import torch\nfrom vllm.utils import x", ["vllm"]),
        ("tinfer.api.vllm_parsers", "import vllm", []),
        ("tinfer.api.server", "if TYPE_CHECKING:\n    import torch", ["torch"]),
        ("tinfer.errors", "import tinfer.clock", ["tinfer.clock"]),
        ("tinfer.cli", "import click\ndef f():\n    import tinfer.master.app", []),
        ("tinfer.cli", "import aiohttp", ["aiohttp (at import time)"]),
    ],
)
def test_the_contract_itself(module: str, source: str, found: list[str]) -> None:
    assert breaches(module, ast.parse(source)) == found


@pytest.mark.parametrize("module", [name for name in WITHOUT_ENGINE if name in MODULES])
def test_loads_neither_torch_nor_vllm(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(sys.modules.keys() & {{'torch', 'vllm'}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
