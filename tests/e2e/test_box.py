"""What a server of real engines needs of the box, and what it leaves there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest

from tests.e2e.remains import Remains
from tests.e2e.serving import complete_all, get_json, serving, until_idle
from tests.process.privileges import SHM_MIB, small_shared_memory

pytestmark = pytest.mark.timeout(300)

KV_BYTES = 96 << 20
# Two semaphores of multiprocessing, one per worker and a page each (vLLM 0.32 with one rank per
# worker); the rest is room for another version's.
SHM_NEED_BYTES = 64 << 10


async def test_a_small_dev_shm_and_a_killed_master(tmp_path: Path, model_dir: str) -> None:
    """KV memory larger than /dev/shm, in a mount namespace where that holds 64 MB. Where no such
    namespace may be made, the same limits are checked on the machine's own /dev/shm: next to
    nothing of the server may be mapped from it.
    """
    names = ("--served-model-name", "tiny", "--route", "split", "--log-dir", str(tmp_path))
    memory = ("--kv-cache-memory-bytes", str(KV_BYTES))
    prefix = small_shared_memory()
    assert KV_BYTES > SHM_MIB << 20
    before = set(_temporary_files())
    with serving(tmp_path, model_dir, *names, *memory, prefix=prefix) as server:
        bodies = [
            {"model": "tiny", "prompt": [7 + n] * 300, "max_tokens": 20, "ignore_eos": True}
            for n in range(4)
        ]
        answers = await complete_all(server.url, bodies)
        assert [len(choice.token_ids) for (choice,) in answers] == [20] * 4
        await until_idle(server.url)
        state = await get_json(f"{server.url}/debug/state")
        workers = {w["role"]: w for w in state["workers"]}
        assert workers["decode"]["engine"]["num_pulls"] == 4
        assert {w["restarts"] for w in workers.values()} == {0}

        family = server.family()
        assert sum(_mapped_shm_bytes(process) for process in family) <= SHM_NEED_BYTES
        if prefix:
            seen_root = Path("/proc") / str(workers["decode"]["pid"]) / "root"
            room = os.statvfs(seen_root / "dev" / "shm")
            assert room.f_blocks * room.f_frsize == SHM_MIB << 20
            assert (room.f_blocks - room.f_bfree) * room.f_frsize <= SHM_NEED_BYTES

        remains = Remains.of(server)
        # What engines put into the temporary directory is inside the run directory.
        assert list((remains.run_dir / "tmp").glob("vllm_dist_*"))
        server.kill()
        assert remains.left(10.0) == []
    assert set(_temporary_files()) - before == set()


def _mapped_shm_bytes(process: psutil.Process) -> int:
    """Bytes of files in /dev/shm that a process has mapped, files without a name included."""
    text = Path(f"/proc/{process.pid}/maps").read_text()
    spans = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .* /dev/shm/", text, re.MULTILINE)
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def _temporary_files() -> list[str]:
    """What is directly in the temporary directory, but for what torch caches there on purpose."""
    names = os.listdir(os.environ["TMPDIR"])
    return [name for name in names if not name.startswith("torchinductor_")]
