"""vLLM's executor for several ranks, as a tensor-parallel worker needs it.

The ranks are forked from the worker where that is safe, which takes a second instead of the ten or
more of fresh interpreters. A rank that ends takes the worker with it, and the reason is kept.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from multiprocessing import connection
from pathlib import Path
from typing import Any

from vllm.v1.executor import multiproc_executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProcHandle

from tinfer.worker.ranks.plan import plan_of
from tinfer.worker.wake import Waker

log = logging.getLogger(__name__)


class RankDied(RuntimeError):
    """A rank's process has ended; the worker cannot go on without it."""


class RankExecutor(MultiprocExecutor):
    """Starts the ranks, and watches them. `death` says how the first of them ended."""

    death: str | None = None
    _closing = False

    def _init_executor(self) -> None:
        plan = plan_of(self.vllm_config)
        transfer = self.vllm_config.kv_transfer_config
        assert transfer is not None
        self._wake = Waker(transfer.kv_connector_extra_config["wake_path"])
        Path(plan.folder).mkdir(mode=0o700, exist_ok=True)
        # vLLM's own choice on a CPU is spawn, since it sets up threads by environment variables;
        # here each rank sets up its own (`rank_cpu`).
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = self._start_method()
        # Both sides of the rendezvous, and with it the names of the ranks' shared buffers.
        module: Any = multiproc_executor
        module.get_file_store_init_method = lambda: f"file://{plan.folder}/{plan.prefix}store"
        super()._init_executor()
        # Ranks end with the worker's process, and at once; vLLM's way waits for each of them.
        finalizer: Any = self._finalizer
        finalizer.detach()

    def _start_method(self) -> str:
        """Fork on a CPU while this process has one thread; a forked process has no CUDA."""
        if self.device_config.device_type != "cpu":
            return "spawn"
        num_tasks = len(os.listdir("/proc/self/task"))
        if num_tasks == 1:
            return "fork"
        log.warning("ranks are spawned, not forked: this process has %d threads", num_tasks)
        return "spawn"

    def start_worker_monitor(self, inline: bool = False) -> None:
        """Called by vLLM once all ranks run."""
        threading.Thread(target=self._watch_ranks, name="rank-watch", daemon=True).start()

    def _watch_ranks(self) -> None:
        handles: dict[Any, WorkerProcHandle] = {w.proc.sentinel: w for w in self.workers}
        first = handles[connection.wait(list(handles))[0]]
        first.proc.join()
        if self._closing:
            return
        self.death = f"rank {first.rank} (process {first.proc.pid}) {_ended(first.proc.exitcode)}"
        self.is_failed = True
        log.error("%s", self.death)
        for worker in self.workers:
            if worker.worker_response_mq is not None:
                worker.worker_response_mq.shutdown()  # wakes whoever waits for an answer
        self._wake()

    def close(self) -> None:
        """From now on the end of a rank is expected."""
        self._closing = True

    def check(self) -> None:
        """Raises `RankDied` once a rank has ended."""
        if self.death is not None:
            raise RankDied(self.death)

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        """A call that fails because a rank ended says so."""
        try:
            return super().collective_rpc(*args, **kwargs)
        except RuntimeError as error:
            if self.death is not None:
                raise RankDied(self.death) from error
            raise


def _ended(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"
