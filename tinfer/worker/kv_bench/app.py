"""`tinfer bench handoff` from options to exit code: measure, report.

The result (`--json`) is one object:

| key | holds |
|---|---|
| `kind` | "tinfer bench handoff" |
| `date`, `command`, `versions`, `hardware`, `settings`, `seed` | what it takes to run it again |
| `num_layers`, `num_allocations`, `buffer_bytes` | of the KV buffers |
| `pieces` | what `pieces` means here: "same" with a C compiler, "even" on a GPU, or null |
| `ended_early` | null or "interrupted" |
| `rows` | see `Row` in tinfer/worker/kv_bench/copies.py |
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

import tinfer
from tinfer.errors import StartError
from tinfer.worker.kv_bench.cache import NUM_ALLOCATIONS
from tinfer.worker.kv_bench.copies import Row, rows_of
from tinfer.worker.kv_bench.options import NUM_LAYERS, HandoffOptions
from tinfer.worker.kv_bench.pieces import compiled
from tinfer.worker.kv_bench.report import line_of, title

EXIT_OK = 0
EXIT_INTERRUPTED = 130


def run(options: HandoffOptions) -> int:
    """Measure and report; returns the exit code.

    0: everything was measured; 130: interrupted, and what was measured by then is reported. Raises
    `StartError` where nothing can be, `OSError` where the result cannot be written.
    """
    device = _device(options.device)
    torch.set_num_threads(1)
    total_bytes = options.buffer_bytes or (4 << 30 if device.type == "cuda" else 1 << 30)
    copy_pieces = compiled() if device.type == "cpu" else None
    out = sys.stderr if options.json_path == "-" else sys.stdout
    print(title(_hardware(device)), file=out, flush=True)
    rows: list[Row] = []
    is_interrupted = False
    try:
        for row in rows_of(options, device, total_bytes, copy_pieces):
            rows.append(row)
            print(line_of(row), file=out, flush=True)
    except KeyboardInterrupt:
        is_interrupted = True
    pieces = "even" if device.type == "cuda" else "same" if copy_pieces is not None else None
    _write(
        options,
        rows,
        {
            "kind": "tinfer bench handoff",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(["tinfer", *sys.argv[1:]]),
            "versions": {
                "tinfer": tinfer.__version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
            },
            "hardware": _hardware(device),
            "settings": msgspec.to_builtins(options, enc_hook=str),
            "seed": options.seed,
            "num_layers": NUM_LAYERS,
            "num_allocations": NUM_ALLOCATIONS,
            "buffer_bytes": total_bytes,
            "pieces": pieces,
            "ended_early": "interrupted" if is_interrupted else None,
            "rows": msgspec.to_builtins(rows),
        },
    )
    return EXIT_INTERRUPTED if is_interrupted else EXIT_OK


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartError(f"--device {name}: no device is called that") from error
    if device.type not in ("cpu", "cuda"):
        raise StartError(f"--device {name}: cpu or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartError(f"--device {name}: there is no such GPU")
    return device


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _write(options: HandoffOptions, rows: list[Row], result: dict[str, Any]) -> None:
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if options.json_path == "-":
        sys.stdout.write(text + "\n")
    elif options.json_path is not None:
        Path(options.json_path).write_text(text + "\n")
    if options.plot_dir is not None:
        from tinfer.worker.kv_bench.charts import draw

        sys.stderr.write(f"drawn: {draw(rows, options.plot_dir)}\n")
