"""The process that serves HTTP has no use for torch, and must not pay for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio, sys
from pathlib import Path
from tests.api.canned import CannedService
from tinfer.api.options import ApiOptions
from tinfer.api.render import ChatOptions, Renderer
from tinfer.api.schemas import Message
from tinfer.api.server import create_app

async def main():
    renderer = await Renderer.load(Path(sys.argv[1]))
    create_app(CannedService(), renderer, ApiOptions(version="x"))
    await renderer.render_chat([Message("user", "hi")], ChatOptions())
    renderer.close()

asyncio.run(main())
sys.exit(" ".join({"torch", "vllm"} & sys.modules.keys()) or 0)
"""


def test_loading_and_rendering_import_neither_torch_nor_vllm(model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model_dir)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
