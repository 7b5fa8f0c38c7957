"""Answers that take longer than they may, and clients that do not read: both are bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

import tinfer
from tests.process.box import Server, running, until
from tests.process.load import completion
from tests.process.stalled import stalled_client
from tinfer.client.errors import ApiError

ENDLESS = {"step_s": 0.01, "mean_output_tokens": 1_000_000}
LONG: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 30_000, "ignore_eos": True}


async def post(
    server: Server, body: dict[str, Any], **headers: str
) -> tuple[int, dict[str, str], str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/completions", json=body, headers=headers) as answer,
    ):
        return answer.status, dict(answer.headers), await answer.text()


async def test_an_answer_ends_at_the_servers_deadline_or_at_its_own(tmp_path: Path) -> None:
    with running(tmp_path, ENDLESS, request_timeout=1.0) as server:
        for headers, seconds in (
            ({}, "1"),
            ({"X-Request-Timeout": "0.25"}, "0.25"),
            ({"X-Request-Timeout": "90"}, "1"),
        ):
            status, got, text = await post(server, LONG, **headers)
            error = json.loads(text)["error"]
            assert (status, error["type"], error["code"]) == (504, "GatewayTimeoutError", 504)
            assert error["message"] == f"the answer was not complete after {seconds} s"
            assert got["x-should-retry"] == "false"
        status, _, text = await post(server, {**LONG, "stream": True})
        events = [line for line in text.split("\n\n") if line]
        assert status == 200 and events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 504
        assert len(events) > 10, "what came until then was sent"
        short = completion([1], max_tokens=5)
        await server.answer(short)
        short.check_answered(server.settings)
        await server.idle()
        server.stop()


async def test_a_header_that_is_no_time(tmp_path: Path) -> None:
    with running(tmp_path, ENDLESS) as server:
        for text in ("0", "-1", "nan", "inf", "soon", ""):
            status, _, body = await post(server, LONG, **{"X-Request-Timeout": text})
            assert status == 400 and "X-Request-Timeout takes seconds" in body
        await server.idle()


async def test_clients_do_not_send_it_again(tmp_path: Path) -> None:
    with running(tmp_path, ENDLESS, request_timeout=0.3) as server:
        async with tinfer.AsyncClient(server.url, max_retries=2) as client:
            with pytest.raises(ApiError) as caught:
                await client.completions([1, 2], max_tokens=30_000, ignore_eos=True)
            assert caught.value.status == 504
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="x", max_retries=2
        ) as stock:
            with pytest.raises(openai.InternalServerError):
                await stock.completions.create(
                    model=(await stock.models.list()).data[0].id, **LONG_FOR_OPENAI
                )
        await server.idle(num_finished=2)
        server.stop()


LONG_FOR_OPENAI: dict[str, Any] = {
    "prompt": [1, 2, 3],
    "max_tokens": 30_000,
    "extra_body": {"ignore_eos": True},
}


async def test_a_client_that_does_not_read_costs_no_memory_and_nobody_a_step(
    tmp_path: Path,
) -> None:
    """Its answer waits in one piece, of at most the length of an answer; others get every token as
    it comes; at the deadline it is cut off."""
    options = {"request_timeout": 6.0}
    with running(tmp_path, {**ENDLESS, "step_s": 0.001}, **options) as server:
        body = json.dumps({**LONG, "stream": True}).encode()
        socks = [await stalled_client(server, body) for _ in range(8)]
        try:
            await server.until_phase(decoding=8)
            rss_bytes = server.master.memory_info().rss
            quick = [completion([n], max_tokens=200, ignore_eos=True) for n in range(20)]
            await server.answer(*quick)
            for request in quick:
                request.check_answered(server.settings)
            # Eight answers of some thousand tokens each; a copy per step would be gigabytes.
            assert server.master.memory_info().rss - rss_bytes < 64 << 20

            async def num_open() -> int:
                return int((await server.state())["requests_by_phase"]["decoding"])

            await until(num_open, lambda number: number == 0)
            await server.idle()
        finally:
            for sock in socks:
                sock.close()
        server.stop()
