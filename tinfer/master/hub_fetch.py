"""Downloads a model's files, in a process of its own.

The hub's library downloads on threads that nothing can interrupt; a process can be killed, so that
Ctrl-C works at once. What has arrived stays in the library's cache and the next start goes on from
there. Run as a module it takes an order on standard input and answers on standard output; its
progress bars are on standard error.
"""

from __future__ import annotations

import ctypes
import glob
import os
import signal
import subprocess
import sys
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.errors import StartError
from tinfer.master.hub import HubModel, as_order, explain

_PR_SET_PDEATHSIG = 1


class Answer(Struct, frozen=True):
    """The folder with all files, or why there is none."""

    directory: str = ""
    error: str = ""


def fetch(model: HubModel) -> str:
    """Download what is missing and return the model's folder. Blocks, and ends at once on Ctrl-C.

    Raises `StartError`. Leaves nothing but the cache's own resumable parts when it is cut short.
    """
    process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
        [sys.executable, "-P", "-m", "tinfer.master.hub_fetch"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C is this process's matter
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        out, _ = process.communicate(msgspec.json.encode(as_order(model)))
    except BaseException:
        process.kill()
        process.wait()
        raise
    try:
        answer = msgspec.json.decode(out, type=Answer)
    except msgspec.DecodeError as error:
        raise StartError(f"the download of {model.repo} ended with {process.returncode}") from error
    if answer.error:
        raise StartError(answer.error)
    return answer.directory


def _download(order: dict[str, Any]) -> Answer:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repo, revision = order["repo"], order["revision"]
    try:
        directory = snapshot_download(
            repo, revision=revision, allow_patterns=[glob.escape(name) for name in order["names"]]
        )
    except Exception as error:  # noqa: BLE001  the other process tells it
        return Answer(error=explain(error, repo, revision).message)
    return Answer(directory=str(directory))


def _main() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told
        return
    text = sys.stdin.buffer.read()
    if not text:  # given up before it began
        return
    order = msgspec.json.decode(text, type=dict[str, Any])
    sys.stdout.buffer.write(msgspec.json.encode(_download(order)))
    sys.stdout.flush()
    # Threads of an interrupted download would keep the interpreter from ending.
    os._exit(0)


if __name__ == "__main__":
    _main()
