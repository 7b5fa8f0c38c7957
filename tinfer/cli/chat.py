"""`tinfer chat`: read the options, chat, turn the end into an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tinfer.cli.ending import ended
from tinfer.cli.key import api_key_option


@click.command("chat")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [-- SERVE_OPTIONS]")
@click.option("--url", help="Chat with the server that runs there, instead of starting one.")
@api_key_option()
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens of an answer, at most.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.")
@click.option(
    "--json",
    "transcript",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append one JSON object per answer to this file, with how it was served.",
)
def command(
    words: tuple[str, ...],
    url: str | None,
    api_key: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    transcript: Path | None,
) -> None:
    """Chat in the terminal, with a server that runs (--url) or with one started for the chat.

    MODEL is what to serve, as for `tinfer serve`; with --url it is the name to ask for. What stands
    after -- is passed on to `tinfer serve`. When standard input is no terminal, every line of it is
    a question, answers go to standard output, and the exit code is 1 if one of them failed. What a
    server with a reasoning parser tells apart as reasoning goes to standard error.
    """
    has_model = bool(words) and not words[0].startswith("-")
    model, rest = (words[0], words[1:]) if has_model else (None, words)
    if rest and url is not None:
        raise click.UsageError("options of `tinfer serve` are of no use with --url")
    if rest and not rest[0].startswith("-"):
        raise click.UsageError(f"one model at a time; {rest[0]!r} is too much")
    from tinfer.chat.app import ChatOptions, run

    options = ChatOptions(
        model=model,
        url=url,
        api_key=api_key or None,
        serve_options=rest,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        transcript=transcript,
    )
    sys.exit(ended(lambda: run(options)))
