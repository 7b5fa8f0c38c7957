"""What surrounds the ranks of a worker: cores, names in shared memory, wakes, and their end."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tinfer.wire.control import WorkerSpec
from tinfer.worker.ranks import names, shm_room
from tinfer.worker.ranks.plan import make_plan, share_out
from tinfer.worker.wake import WakePipe, Waker

MIB = 1 << 20


@pytest.mark.parametrize(
    ("cpus", "num_ranks", "shares"),
    [
        ([2, 3, 4, 5], 2, [[2, 3], [4, 5]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3]]),
        ([7], 2, [[7], [7]]),
        ([0, 1, 2], 4, [[0, 1, 2]] * 4),
        ([], 2, [[], []]),
    ],
)
def test_cores_are_shared_out_evenly(
    cpus: list[int], num_ranks: int, shares: list[list[int]]
) -> None:
    assert share_out(cpus, num_ranks) == shares


def _spec(run_dir: Path) -> WorkerSpec:
    return WorkerSpec(
        worker_id="decode-0",
        generation=3,
        engine="vllm",
        model_dir="",
        socket_path=str(run_dir / "workers.sock"),
        log_path="",
        kv_transport="shm",
        device="cpu",
        cpus=[0, 1],
        environment={},
        engine_args={},
        lease_ttl_s=1.0,
        tensor_parallel_size=2,
    )


def test_ranks_say_why_they_could_not_start(tmp_path: Path) -> None:
    plan = make_plan(_spec(tmp_path), 77)
    assert (plan.prefix, plan.folder) == (f"{tmp_path.name}.77.", str(tmp_path / "77"))
    Path(plan.folder).mkdir()
    assert plan.start_errors() == []
    plan.error_file(1).write_text("ValueError: no")
    assert plan.start_errors() == ["rank 1: ValueError: no"]


def test_only_the_names_of_the_dead_worker_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shm, run_dir = tmp_path / "shm", tmp_path / "tinfer-abc"
    monkeypatch.setattr(names, "SHM", shm)
    folder = names.worker_folder(run_dir, 12)
    for made in (shm, run_dir, folder, names.worker_folder(run_dir, 123)):
        made.mkdir()
    (folder / "store").touch()
    theirs = {"tinfer-abc.123.x", "tinfer-abcd.12.x", "sem.tinfer-abc.123.y", "psm_1", "sem.mp-1"}
    for name in {"tinfer-abc.12.x", "tinfer-abc.12.store-tp:0-cpushm_1", "sem.tinfer-abc.12.y"}:
        (shm / name).touch()
    for name in theirs:
        (shm / name).touch()

    names.forget_worker(run_dir, 12)
    assert set(os.listdir(shm)) == theirs
    assert os.listdir(run_dir) == ["123"]
    names.forget_worker(run_dir, 12)

    names.forget_all(run_dir)
    assert set(os.listdir(shm)) == {"tinfer-abcd.12.x", "psm_1", "sem.mp-1"}
    assert not run_dir.exists()


def test_shared_memory_and_semaphores_get_the_prefix_and_no_tracker() -> None:
    """In a process of its own, which is killed with the names in place."""
    prefix = f"tinfer-test.{os.getpid()}."
    script = """if True:
        import multiprocessing, os, sys
        from multiprocessing import resource_tracker, shared_memory
        from tinfer.worker.ranks.names import use_prefix
        use_prefix(sys.argv[1])
        kept = [shared_memory.SharedMemory(create=True, size=64)]
        kept.append(multiprocessing.get_context("spawn").Lock())
        print(resource_tracker._resource_tracker._pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, prefix], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (-9, "None\n"), done.stderr
        ours = sorted(n.split(prefix)[0] for n in os.listdir(names.SHM) if prefix in n)
        assert ours == ["", "sem."]
    finally:
        names.unlink_names(prefix)
    assert not [name for name in os.listdir(names.SHM) if prefix in name]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free_mib", "fits"), [(64, True), (20, True), (12, False)])
def test_too_small_shared_memory_is_told_before_the_start(
    monkeypatch: pytest.MonkeyPatch, free_mib: int, fits: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free_mib * MIB))
    obstacle = shm_room.shm_obstacle(num_ranks=2, num_threads=1, device="cpu")
    assert (obstacle is None) == fits
    if obstacle is not None:
        assert "2 ranks share 17 MiB in /dev/shm, and 12 MiB are free" in obstacle


def test_more_ranks_and_threads_share_more() -> None:
    def needed(num_ranks: int, num_threads: int, device: str) -> int:
        return shm_room.shm_bytes(num_ranks, num_threads, device)

    # What two ranks had in /dev/shm when it was measured, in KiB, with one and with two threads.
    assert needed(2, 1, "cpu") >= (2 * 4100 + 9300) << 10
    assert needed(2, 2, "cpu") >= (2 * 8200 + 9300) << 10
    assert needed(4, 1, "cpu") > needed(2, 1, "cpu") > needed(2, 1, "cuda") > 0


def test_a_wake_is_seen_until_it_is_cleared() -> None:
    pipe = WakePipe()
    waker = Waker(pipe.path)
    assert select.select([pipe.fd], [], [], 0)[0] == []
    for _ in range(1 << 17):  # more than a pipe holds
        waker()
    assert select.select([pipe.fd], [], [], 0)[0] == [pipe.fd]
    pipe.clear()
    assert select.select([pipe.fd], [], [], 0)[0] == []
    pipe.close()
    waker()  # a loop that has closed its end looks no more
    waker.close()


@pytest.mark.parametrize("early", [True, False])
def test_a_process_dies_with_its_parent(early: bool) -> None:
    """Killed before or after the child has asked for it; a pipe tells the child's end."""
    script = """if True:
        import os, signal, sys, time
        from tinfer.worker.prctl import die_with_parent
        early, out = sys.argv[1] == "True", int(sys.argv[2])
        parent = os.getpid()
        go_read, go_write = os.pipe()
        if os.fork() == 0:
            os.close(go_write)
            if early:
                os.read(go_read, 1)  # until the parent is gone
            die_with_parent(parent)
            os.write(out, b"alive")
            signal.pause()
        if not early:
            signal.pause()
        os.kill(parent, signal.SIGKILL)
    """
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(early), str(write_fd)], pass_fds=[write_fd]
    )
    os.close(write_fd)
    try:
        if not early:
            assert os.read(read_fd, 5) == b"alive"
            process.kill()
        assert os.read(read_fd, 5) == b""  # at the end of both
        process.wait()
    finally:
        os.close(read_fd)
