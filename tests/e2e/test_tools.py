"""A tool that must be called, after reasoning, through the split on real vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tinfer
from tests.e2e.serving import serving, until_idle

# Tokens that the built-in model's chats never have, and what they are called here.
MARKS = {"<|pad|>": "<think>", "<|reserved|>": "</think>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": [3, 5]}},
            "required": ["to"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def thinking_dir(model_dir: str, tmp_path: Path) -> Path:
    """The built-in model with names for the marks of reasoning."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    for file in folder.glob("tokenizer*.json"):
        text = file.read_text()
        for before, after in MARKS.items():
            text = text.replace(before, after)
        file.write_text(text)
    return folder


async def test_a_required_tool_is_called_after_reasoning(
    thinking_dir: Path, tmp_path: Path
) -> None:
    parsers = ("--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1")
    options = ("--enable-auto-tool-choice", *parsers, "--route", "split", "--cpu-threads", "1")
    with serving(tmp_path, str(thinking_dir), *options) as server:
        async with tinfer.AsyncClient(server.url) as client:
            ends = (await client.tokenize("</think>", add_special_tokens=False)).tokens
            blanks = (await client.tokenize(" \n\t\r", add_special_tokens=False)).tokens
            # It ends its reasoning with the first token, which a grammar that held too early would
            # not let it, and then wants to do so forever, which the grammar does not let it.
            bias = {str(i): 100.0 for i in ends} | {str(i): -100.0 for i in blanks}
            ask = {"tools": [TOOL], "temperature": 0, "max_tokens": 200, "return_token_ids": True}
            ask |= {"tool_choice": "required", "logit_bias": bias}
            said = await client.chat("Count from 1 to 3.", extra=ask)
            async with client.stream_chat("Count from 1 to 3.", extra=ask) as stream:
                async for _ in stream:
                    pass
            ask["include_reasoning"] = False
            direct = await client.chat("Count from 1 to 3.", extra=ask)
            plain = await client.chat("Count from 1 to 3.", temperature=0)
        await until_idle(server.url)
    assert "leaked" not in server.output, "what the parsers brought along says of its end"
    assert len(ends) == 1 and said.token_ids is not None and said.token_ids[0] == ends[0]
    (call,) = said.tool_calls
    assert call.function.name == "count"
    assert json.loads(call.function.arguments) in ({"to": 3}, {"to": 5})
    assert (said.finish_reason, said.text, said.reasoning) == ("tool_calls", "", "")
    (streamed,) = stream.tool_calls
    assert streamed.function.name == call.function.name
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
    assert (stream.finish_reason, stream.token_ids) == ("tool_calls", said.token_ids)
    # Where nobody is to see it there is no reasoning: the grammar holds from the first token on.
    assert said.usage is not None and direct.usage is not None
    assert direct.usage.completion_tokens == len(said.token_ids) - 1
    # Without a tool to call there is no end to what the model thinks.
    assert (plain.text, plain.reasoning) == ("", "1 2 3")
