"""More than the server can take, and less server than there was: what clients are told then."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
import msgspec

from tests.process.box import Server, running
from tests.process.load import Request, chat, completion
from tests.process.stalled import stalled_client

FAST = {"num_blocks": 4096, "block_tokens": 16, "mean_output_tokens": 30}
CHUNK_TOKENS = 64
BATCH = {"max_num_seqs": 8, "max_num_batched_tokens": CHUNK_TOKENS}
NO_WORKER = "no worker is up"
LONG = 10_000


def chunk_long(seed: int) -> Request:
    """A request whose prompt is one chunk."""
    return completion([1 + seed % 250] * CHUNK_TOKENS, seed=seed)


async def test_a_full_queue_is_429_with_a_time_to_come_back(tmp_path: Path) -> None:
    """With stopped workers nothing leaves the queue: two chunks are outstanding, four wait."""
    with running(tmp_path, FAST, max_num_queued_reqs=4, **BATCH) as server:
        for worker_id in ("prefill-0", "decode-0"):
            await server.signal(worker_id, signal.SIGSTOP)
        requests = [chunk_long(n) for n in range(20)]
        answers = asyncio.create_task(server.answer(*requests))
        await server.until_phase(queued=4, prefilling=2)
        refusals = [chunk_long(n) for n in range(5)] + [
            chat("hello", stream=False),
            completion([1], stream=False, n=2, num_choices=2),
        ]
        await server.answer(*refusals)
        for worker_id in ("prefill-0", "decode-0"):
            await server.signal(worker_id, signal.SIGCONT)
        await answers
        taken = [request for request in requests if request.error is None]
        assert len(taken) == 6
        for request in taken:
            request.check_answered(server.settings)
        refusals += [request for request in requests if request.error is not None]
        for request in refusals:
            assert request.error is not None
            assert (request.status, request.error["code"]) == (429, 429)
            assert request.retry_after is not None and int(request.retry_after) >= 1
        await server.idle(num_finished=6)
        again = await server.answer(*(chunk_long(n) for n in range(4)))
        for request in again:
            request.check_answered(server.settings)


async def refused(server: Server) -> None:
    """New requests of any kind get 503, and so does the health check."""
    for request in await server.answer(completion([1]), chat("x", stream=False)):
        assert request.error is not None
        assert (request.status, request.error["message"]) == (503, NO_WORKER)
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/health") as response:
        assert (response.status, await response.text()) == (503, NO_WORKER)


async def answered(server: Server, num: int = 10) -> None:
    requests = [completion([n + 1] * 30, seed=n) for n in range(num)]
    for request in await server.answer(*requests):
        request.check_answered(server.settings)
    await server.idle()


async def test_given_up_workers_are_missed_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Without prefill workers requests are computed whole; without any worker there is 503."""
    options = {"prefill": 1, "decode": 2, "max_worker_restarts": 0, **BATCH}
    with running(tmp_path, FAST, **options) as server:
        await answered(server)
        for number, worker_id in enumerate(("decode-0", "prefill-0", "decode-1"), 1):
            await server.signal(worker_id, signal.SIGKILL)
            await server.until_worker(worker_id, "given-up")
            if number < 3:
                await answered(server)
        workers = await server.workers()
        assert all(worker["scheduled"] is None for worker in workers.values())
        assert {worker["reason"] for worker in workers.values()} == {"killed by SIGKILL"}
        await refused(server)
        assert (await server.state())["status"] == NO_WORKER
        server.stop()


async def test_the_last_decode_worker_is_given_up(tmp_path: Path) -> None:
    """What it read, what waited for it and what comes later runs whole on the other one."""
    options = {"max_worker_restarts": 0, **BATCH, "max_num_seqs": 2}
    with running(tmp_path, FAST, **options) as server:
        await server.signal("decode-0", signal.SIGSTOP)
        requests = [completion([n + 1] * 20, ignore_eos=True, seed=n) for n in range(4)]
        answers = asyncio.create_task(server.answer(*requests))
        await server.until_phase(handoff=4)
        await server.signal("decode-0", signal.SIGKILL)
        await answers
        for request in requests:
            request.check_answered(server.settings)
        await server.until_worker("decode-0", "given-up")
        await answered(server)
        await server.idle(num_finished=14)


async def test_workers_on_their_way_back_are_waited_for(tmp_path: Path) -> None:
    """Queued requests outlive a moment without any worker that can take them."""
    with running(tmp_path, {**FAST, "start_s": 0.3}, **BATCH) as server:
        await server.signal("prefill-0", signal.SIGSTOP)
        requests = [chunk_long(n) for n in range(8)]
        answers = asyncio.create_task(server.answer(*requests))
        await server.until_phase(queued=6, prefilling=2)
        await server.signal("prefill-0", signal.SIGKILL)
        await answers
        for request in requests:
            request.check_answered(server.settings)
        assert (await server.state())["num_restarts"] == 2
        await server.idle(num_finished=8)


async def test_a_client_that_does_not_read_delays_nobody(tmp_path: Path) -> None:
    """Its answer is computed to the end while it sleeps; what it then reads is right, and the
    part that waited for it is one event: one answer's worth is all that was kept."""
    fake = {**FAST, "num_blocks": 8192}
    with running(tmp_path, fake, **BATCH) as server:
        long = completion([7, 8, 9], max_tokens=LONG, ignore_eos=True, logprobs=20)
        sock = await stalled_client(server, msgspec.json.encode(long.body))
        with sock:
            await server.until_phase(decoding=1)
            await answered(server, 30)
            await server.until(lambda state: state["num_finished"] == 31)
            reader, writer = await asyncio.open_connection(sock=sock)
            head, _, stream = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
        assert head.startswith(b"HTTP/1.0 200")
        *events, done, end = stream.split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b"")
        sizes = []
        for event in events:
            before = len(long.choices[0].token_ids)
            long.see_event(msgspec.json.decode(event.removeprefix(b"data: ")))
            sizes.append(len(long.choices[0].token_ids) - before)
        long.status, long.done = 200, True
        long.check_answered(server.settings)
        assert max(sizes) > LONG // 10, "what waited was not merged"
        await server.idle(num_finished=31)
