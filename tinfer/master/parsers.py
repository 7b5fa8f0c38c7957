"""The parsers of tool calls and reasoning that the options name, for the API to read answers with.

vLLM has them, so a server that is asked for any imports vLLM in this process as well: at the start,
while the workers' import process does the same, and never during a request.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tinfer.api.parsing import Parsers
from tinfer.api.render import Renderer
from tinfer.config import ServeConfig
from tinfer.errors import StartError


def check_parsers(config: ServeConfig) -> None:
    """Raises `StartError` for options that do not go without each other."""
    if config.enable_auto_tool_choice and config.tool_call_parser is None:
        raise StartError("--enable-auto-tool-choice needs a --tool-call-parser")


def names_parsers(config: ServeConfig) -> bool:
    """Whether the server is to have any."""
    calls = config.enable_auto_tool_choice and config.tool_call_parser is not None
    return calls or config.reasoning_parser is not None


async def load_parsers(config: ServeConfig, renderer: Renderer, model_dir: str) -> Parsers | None:
    """None where the options name none. Raises `StartError`."""
    if not names_parsers(config):
        return None
    tool_call = config.tool_call_parser if config.enable_auto_tool_choice else None
    from tinfer.api import vllm_parsers

    names = vllm_parsers.ParserNames(tool_call, config.reasoning_parser, config.tool_strict_level)
    return await asyncio.to_thread(
        vllm_parsers.load_parsers, names, renderer.tokenizer, Path(model_dir)
    )
