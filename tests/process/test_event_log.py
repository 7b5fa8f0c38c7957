"""What a live server has logged of its scheduling is replayed to the same decisions."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

from tests.process.box import running
from tests.process.load import random_request
from tinfer.master.event_log import replay

# Blocks for a handful of requests: preemption and waiting hand-offs happen all the time.
TIGHT = {"num_blocks": 40, "block_tokens": 8, "step_s": 0.0005, "mean_output_tokens": 24, "seed": 5}
NUM_REQUESTS = 200


async def test_a_log_of_everything_that_can_happen_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "events"
    options = {"route": "auto", "decode_admission": "greedy", "max_num_seqs": 32}
    with running(tmp_path, TIGHT, prefill=2, decode=2, event_log=path, **options) as server:
        rng = random.Random(20261121)
        requests = [random_request(rng, 160, server.settings) for _ in range(NUM_REQUESTS)]
        answers = asyncio.create_task(server.answer(*requests, num_connections=48))
        await server.until(lambda state: state["num_finished"] > NUM_REQUESTS // 4)
        await server.signal("decode-1", signal.SIGKILL)
        await server.until_worker("decode-1", "ready", generation=2)
        await answers
        await server.idle()
        server.stop()
    log = path.read_bytes()
    for name in (b"StartWhole", b"StartDecode", b"Resume", b"WorkerDown", b"SetBudget"):
        assert b'"type":"%b"' % name in log
    assert replay(path) > 10 * NUM_REQUESTS
