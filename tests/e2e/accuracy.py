"""The built-in model's answers to held-out questions: through a server, and one plain engine.

Both sides get the same chats greedily and all at once; what they answer is compared answer by
answer, and with what is right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from tests.e2e.plain_engine import PlainEngine
from tinfer.tiny_model import files, tasks
from tinfer.tiny_model.tasks import Example

MAX_ANSWER_TOKENS = 600
OPEN_TASKS = tuple(name for name in tasks.TASKS if name != "small_talk")
# At once per server: enough to overlap every phase, few enough that nothing waits for seats.
CONCURRENCY = 64


def questions(num_per_task: int) -> list[Example]:
    """The same held-out examples of every task each time."""
    return [e for task in OPEN_TASKS for e in tasks.held_out_examples(task, num_per_task)]


async def through_server(url: str, model: str, examples: Sequence[Example]) -> list[str]:
    """The answers of a server's chat endpoint, in order."""
    gate = asyncio.Semaphore(CONCURRENCY)
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def ask(example: Example) -> str:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": example.prompt}],
                "max_tokens": MAX_ANSWER_TOKENS,
                "temperature": 0.0,
            }
            async with gate, session.post(f"{url}/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                answer = await response.json()
            text: str = answer["choices"][0]["message"]["content"]
            return text

        return list(await asyncio.gather(*(ask(example) for example in examples)))


def through_plain_engine(
    model_dir: str, examples: Sequence[Example], dtype: str = "auto"
) -> list[str]:
    """The answers of a plain engine, in order."""
    start = [files.SPECIAL_IDS["<|assistant|>"]]
    cases = [
        {
            "prompt": files.encode_turn("user", example.prompt) + start,
            "params": {"max_tokens": MAX_ANSWER_TOKENS},
        }
        for example in examples
    ]
    with PlainEngine(model_dir, dtype) as engine:
        return [answer[0]["text"] for answer in engine.run(cases)]


def accuracy(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """Share of exactly right answers per task."""
    right: dict[str, list[bool]] = {}
    for example, answer in zip(examples, answers, strict=True):
        right.setdefault(example.task, []).append(answer == example.answer)
    return {task: sum(marks) / len(marks) for task, marks in right.items()}
