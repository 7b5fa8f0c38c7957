"""Answer prompts in a script, without a server to start or stop.

    python examples/offline.py "Count from 1 to 5." "Spell the word lantern."

What runs the model is started here and ends with the script, however that ends. --serve NAME=VALUE
sets an option of `tinfer serve`; without --model the small built-in model is run.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import tinfer
from tinfer.client import TinferClientError
from tinfer.errors import StartError

QUESTIONS = ("Count from 1 to 10.", "Spell the word lantern.", "List 5 animals.")


def answer(arguments: argparse.Namespace) -> None:
    """All questions at once, as chats; then each as the beginning of a text, with two ends."""
    with tinfer.LLM(arguments.model, show=show, **dict(arguments.serve)) as llm:
        greedy = tinfer.SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
        for output in llm.chat([[user(text)] for text in arguments.questions], greedy):
            print(f"{len(output.prompt_token_ids or ())} tokens in: {output.outputs[0].text!r}")

        varied = tinfer.SamplingParams(n=2, seed=7, temperature=1, max_tokens=8, logprobs=0)
        for output in llm.generate(arguments.questions, varied):
            for one in output.outputs:
                chance = f"log probability {one.cumulative_logprob:.2f}"
                print(f"{output.prompt!r} -> {one.text!r} ({one.finish_reason}, {chance})")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def show(line: str) -> None:
    print(line, file=sys.stderr)


def option(text: str) -> tuple[str, Any]:
    """Numbers are numbers; all else is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name.replace("-", "_"), int(value) if value.isdigit() else value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS))
    parser.add_argument("--model", help="directory, or name on the hub; default: built-in")
    parser.add_argument("--max-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--serve", action="append", type=option, default=[], metavar="NAME=VALUE",
        help="an option of `tinfer serve`; may be given several times",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    try:
        answer(parse_arguments())
    except (StartError, TinferClientError, TypeError) as error:
        sys.exit(f"offline.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
