"""Stream a chat with tinfer's own client, and show what it measured.

    tinfer serve                      # in another terminal
    python examples/stream.py "Count from 1 to 20."

Ctrl-C stops the answer, on the server too.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import tinfer
from tinfer.client import ConnectionFailed, TinferClientError


async def answer(base_url: str, prompt: str, max_tokens: int) -> None:
    """Print the answer as it comes, then its length and times."""
    async with (
        tinfer.AsyncClient(base_url) as client,
        client.stream_chat(prompt, max_tokens=max_tokens) as stream,
    ):
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
    print()
    num_tokens = stream.usage.completion_tokens if stream.usage is not None else None
    figures = [f"{num_tokens} tokens", f"finish reason {stream.finish_reason}"]
    if stream.ttft_s is not None:
        figures.append(f"first token after {stream.ttft_s * 1000:.0f} ms")
    if stream.tpot_s is not None:
        figures.append(f"then one per {stream.tpot_s * 1000:.1f} ms")
    print(", ".join(figures), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream one chat answer from a tinfer server.")
    parser.add_argument("prompt", nargs="?", default="Count from 1 to 10.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        asyncio.run(answer(arguments.base_url, arguments.prompt, arguments.max_tokens))
    except ConnectionFailed as error:
        sys.exit(f"stream.py: {error}; start a server with `tinfer serve`")
    except (TinferClientError, ValueError) as error:
        sys.exit(f"stream.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
