"""How a server ends: after its requests, in the middle of them, or by force; nothing stays."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
import msgspec
import pytest

from tests.e2e.serving import wait_gone
from tests.process.box import Server, running, until
from tests.process.load import Request, completion
from tests.process.stalled import stalled_client

SLOW = {"step_s": 0.01, "num_blocks": 4096, "block_tokens": 16}
STREAM_TOKENS = 100
ENDLESS_TOKENS = 30_000


def streams(num: int, num_tokens: int) -> list[Request]:
    return [
        completion([n + 1] * 40, max_tokens=num_tokens, ignore_eos=True, seed=n) for n in range(num)
    ]


async def started(server: Server, requests: list[Request]) -> asyncio.Task[list[Request]]:
    """The requests on their way, each with its first token read."""
    answers = asyncio.create_task(server.answer(*requests))

    async def look() -> int:
        return min(request.num_events for request in requests)

    await until(look, lambda number: number > 0)
    return answers


async def ended(server: Server) -> int:
    return await asyncio.to_thread(server.process.wait_end)


async def refuses(server: Server) -> bool:
    """Whether nobody listens any more."""
    host, port = server.url.removeprefix("http://").split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except (ConnectionRefusedError, ConnectionResetError):
        return True  # reset: it was closed with this connection still to be accepted
    writer.close()
    await writer.wait_closed()
    return False


def gone(server: Server, run_dir: Path) -> None:
    assert wait_gone(server.family) == []
    assert not run_dir.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_lets_streams_finish(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, SLOW) as server:
        run_dir = server.process.run_dir()
        requests = streams(8, STREAM_TOKENS)
        answers = await started(server, requests)
        server.process.process.send_signal(number)
        await server.until(lambda state: state["status"] == "draining")
        late = completion([1])
        await server.answer(late)
        assert late.error is not None
        assert (late.status, late.error["message"]) == (503, "the server is draining")
        for request in await answers:
            request.check_answered(server.settings)
        assert await ended(server) == 0
        gone(server, run_dir)


async def test_a_worker_that_dies_in_the_drain_does_not_hold_it_up(tmp_path: Path) -> None:
    with running(tmp_path, SLOW) as server:
        run_dir = server.process.run_dir()
        answers = await started(server, streams(4, 3 * STREAM_TOKENS))
        server.process.process.send_signal(signal.SIGINT)
        await server.until(lambda state: state["status"] == "draining")
        await server.signal("decode-0", signal.SIGKILL)
        for request in await answers:
            request.check_answered(server.settings)
        assert await ended(server) == 0
        gone(server, run_dir)


@pytest.mark.parametrize("twice", [True, False])
async def test_streams_that_may_not_finish_are_told_so(tmp_path: Path, twice: bool) -> None:
    """By the second signal, or by the end of the time that a drain may take."""
    options = {} if twice else {"shutdown_timeout": 0.2}
    with running(tmp_path, SLOW, **options) as server:
        run_dir = server.process.run_dir()
        requests = [*streams(4, ENDLESS_TOKENS)]
        answers = await started(server, requests)
        server.process.process.send_signal(signal.SIGINT)
        if twice:
            await server.until(lambda state: state["status"] == "draining")
            server.process.process.send_signal(signal.SIGINT)
        for request in await answers:
            assert request.error is not None
            assert (request.error["code"], request.done) == (503, True)
            assert request.error["message"] == "the server is stopping"
            request.check_so_far(server.settings)
        assert await ended(server) == 0
        gone(server, run_dir)


async def test_the_second_signal_does_not_wait_for_a_client_that_does_not_read(
    tmp_path: Path,
) -> None:
    fake = {**SLOW, "step_s": 0.0}
    with running(tmp_path, fake) as server:
        run_dir = server.process.run_dir()
        long = completion([7], max_tokens=10_000, ignore_eos=True, logprobs=20)
        with await stalled_client(server, msgspec.json.encode(long.body)):
            await server.until(lambda state: state["num_finished"] == 1)
            server.process.process.send_signal(signal.SIGINT)
            await until(lambda: refuses(server), lambda refuses: refuses)  # the first has arrived
            server.process.process.send_signal(signal.SIGINT)
            assert await ended(server) == 0
        gone(server, run_dir)


async def test_a_master_that_dies_takes_all_with_it(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, prefill=2, decode=2) as server:
        run_dir = server.process.run_dir()
        answers = await started(server, streams(4, ENDLESS_TOKENS))
        server.process.process.kill()
        with pytest.raises(aiohttp.ClientError):
            await answers
        assert await ended(server) == -signal.SIGKILL
        gone(server, run_dir)
