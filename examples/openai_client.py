"""Use the stock `openai` package against tinfer: a whole chat, then a streamed one.

    pip install openai
    tinfer serve                      # in another terminal
    python examples/openai_client.py

Only `base_url` differs from using OpenAI; the server asks for no key, the package for any.
"""

from __future__ import annotations

import argparse
import sys

try:
    import openai
except ImportError:
    sys.exit("openai_client.py: needs the openai package: pip install openai")


def chat(client: openai.OpenAI, model: str, prompt: str, max_tokens: int) -> None:
    """Ask twice, and print both answers."""
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "user", "content": prompt}
    ]
    whole = client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0
    )
    print(f"whole:    {whole.choices[0].message.content}")
    print("streamed: ", end="")
    with client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
    ) as chunks:
        for chunk in chunks:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    if whole.usage is not None:
        counts = f"{whole.usage.prompt_tokens} + {whole.usage.completion_tokens}"
        print(f"{counts} tokens from model {whole.model}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with tinfer through the openai package.")
    parser.add_argument("prompt", nargs="?", default="Count from 1 to 10.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=64, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        base_url = arguments.base_url.removesuffix("/v1") + "/v1"
        with openai.OpenAI(base_url=base_url, api_key="none") as client:
            model = client.models.list().data[0].id
            chat(client, model, arguments.prompt, arguments.max_tokens)
    except openai.APIConnectionError:
        where = arguments.base_url
        sys.exit(
            f"openai_client.py: nothing answers at {where}; start a server with `tinfer serve`"
        )
    except openai.OpenAIError as error:
        sys.exit(f"openai_client.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
