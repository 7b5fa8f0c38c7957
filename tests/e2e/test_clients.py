"""Clients that know nothing of tinfer, unmodified: the `openai` package and `vllm bench serve`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.serving import ServeProcess, get_json, until_idle
from tests.e2e.vllm_metadata import command_environment

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello!"}]
PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
NUM_BENCH_PROMPTS = 40
BENCH_INPUT_TOKENS = 100
BENCH_OUTPUT_TOKENS = 16
# What the model goes on with after such a prompt may be short; a fixed length is what is compared.
NO_END: dict[str, Any] = {"extra_body": {"ignore_eos": True}}


@pytest.fixture
async def client(server: ServeProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


async def test_completion_streamed_and_not(
    server: ServeProcess, client: openai.AsyncOpenAI
) -> None:
    whole = await client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, **NO_END
    )
    stream = await client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **NO_END,
    )
    chunks = [chunk async for chunk in stream]
    assert whole.choices[0].text
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    for usage in (chunks[-1].usage, whole.usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 20)
        assert usage.total_tokens == len(PROMPT) + 20
    await until_idle(server.url)


async def test_chat_streamed_and_not(server: ServeProcess, client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=20, temperature=0
    )
    stream = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole.choices[0].message.content == "Hello! Ask me to cou"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
    await until_idle(server.url)


async def test_response_streamed_and_not(server: ServeProcess, client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "Hello!", "temperature": 0}
    whole = await client.responses.create(max_output_tokens=20, **asked)
    async with client.responses.stream(**asked) as stream:
        deltas = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert (whole.output_text, whole.status) == ("Hello! Ask me to cou", "incomplete")
    assert final.output_text == "".join(deltas) and final.status == "completed"
    assert final.output_text.startswith(whole.output_text)
    assert whole.usage is not None and whole.usage.output_tokens == 20
    await until_idle(server.url)


async def test_three_answers(server: ServeProcess, client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "n": 3, "seed": 4, **NO_END}
    asked["temperature"] = 2  # or it says the same thing thrice
    whole = await client.completions.create(prompt=PROMPT, **asked)
    stream = await client.completions.create(prompt=PROMPT, stream=True, **asked)
    texts = ["", "", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 3, "three seeds, three answers"
    assert whole.usage is not None and whole.usage.completion_tokens == 120
    await until_idle(server.url)


async def test_stop_and_logprobs(server: ServeProcess, client: openai.AsyncOpenAI) -> None:
    plain = await client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=2, **NO_END
    )
    text = plain.choices[0].text
    stop = text[3:5]
    stopped = await client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop, **NO_END
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(stop)]
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 20
    chat = await client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    listed = chat.choices[0].logprobs
    assert listed is not None and listed.content is not None
    assert len(listed.content) == 6
    for token in listed.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
    await until_idle(server.url)


async def test_synchronous_client(server: ServeProcess) -> None:
    def use() -> tuple[str | None, str, str, str, list[str]]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            greedy: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "temperature": 0, **NO_END}
            chat = client.chat.completions.create(messages=HELLO, **greedy)
            text = client.completions.create(prompt=PROMPT, **greedy).choices[0].text
            with client.chat.completions.create(messages=HELLO, stream=True, **greedy) as chunks:
                said = "".join(c.choices[0].delta.content or "" for c in chunks)
            with client.completions.create(prompt=PROMPT, stream=True, **greedy) as parts:
                streamed = "".join(part.choices[0].text for part in parts)
            names = [model.id for model in client.models.list()]
            return chat.choices[0].message.content, said, text, streamed, names

    chat, said, text, streamed, names = await asyncio.to_thread(use)
    assert chat == said != ""
    assert text == streamed != ""
    assert names == ["tiny"]
    await until_idle(server.url)


async def test_errors_reach_the_client_as_its_own(
    server: ServeProcess, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model="tiny", prompt="a", max_tokens=10**6)
    await until_idle(server.url)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["openai", pytest.param("openai-chat", marks=pytest.mark.full)])
async def test_vllm_bench_serve(
    server: ServeProcess, model_dir: str, backend: str, tmp_path: Path
) -> None:
    before = await get_json(f"{server.url}/debug/state")
    endpoint = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}[backend]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--backend", backend, "--base-url", server.url, "--endpoint", endpoint),
        *("--model", "tiny", "--tokenizer", model_dir, "--dataset-name", "random"),
        *("--num-prompts", str(NUM_BENCH_PROMPTS), "--request-rate", "inf"),
        *("--random-input-len", str(BENCH_INPUT_TOKENS)),
        *("--random-output-len", str(BENCH_OUTPUT_TOKENS), "--ignore-eos"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
        env=command_environment(tmp_path / "metadata"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == NUM_BENCH_PROMPTS, output.decode()[-4000:]
    assert result["failed"] == 0
    assert result["total_output_tokens"] == NUM_BENCH_PROMPTS * BENCH_OUTPUT_TOKENS
    assert result["request_throughput"] > 0 and result["mean_ttft_ms"] > 0
    assert result["mean_tpot_ms"] > 0 and result["mean_itl_ms"] > 0
    await until_idle(server.url)
    after = await get_json(f"{server.url}/debug/state")
    assert after["num_finished"] - before["num_finished"] >= NUM_BENCH_PROMPTS
