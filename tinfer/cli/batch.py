"""`tinfer batch`: read the options, answer a file of requests, turn the end into an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tinfer import config as configuration
from tinfer.cli import serve
from tinfer.cli.ending import ended
from tinfer.cli.key import api_key_option
from tinfer.cli.options import NumberRange, checked
from tinfer.cli.outputs import check_writable, json_option

# As many sequences as two workers take in one step (--max-num-seqs): a queue there costs nothing,
# a seat that stays empty here does.
DEFAULT_CONCURRENCY = 512
# With the client's waits, about a minute of a server that refuses without naming a time.
DEFAULT_RETRIES = 10
DEFAULT_TIMEOUT_S = 3600.0
MAX_TIMEOUT_S = 1e9

_EPILOG = """
\b
A line of IN: {"custom_id": "a", "method": "POST",
               "url": "/v1/chat/completions", "body": {"messages": [...]}}
A line of OUT: {"id", "custom_id", "response": {"status_code",
               "request_id", "body"}, "error": null}; docs/batch.md has all.
\b
Run again, it goes on: OUT is appended to, lines whose custom_id has a
result there are skipped, and a last line that was cut short is redone.
\b
Exit status: 0 when every line is answered; 1 if some failed or are open;
2 for a bad option, files that are no batch, or a server that is not
there; 130 after Ctrl-C.
\b
Examples:
  tinfer batch in.jsonl out.jsonl --model Qwen/Qwen3-8B
  tinfer batch in.jsonl out.jsonl -- --prefill 1 --decode 3
  tinfer batch - out.jsonl --base-url http://127.0.0.1:8000 < in.jsonl
"""


@click.command("batch", epilog=_EPILOG)
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE_OPTIONS]")
@click.option("--base-url", metavar="URL", help="Ask the server there, instead of starting one.")
@api_key_option()
@click.option("--model", help="What to serve, as for `tinfer serve`. Default: the built-in model.")
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    default=DEFAULT_CONCURRENCY,
    show_default=True,
    help="Requests under way at once.",
)
@click.option(
    "--max-retries",
    type=click.IntRange(min=0),
    default=DEFAULT_RETRIES,
    show_default=True,
    help="Further attempts at a request that is refused for now (429, with its Retry-After, 502, "
    "503, 504) or whose connection breaks.",
)
@click.option(
    "--request-timeout",
    "request_timeout_s",
    type=NumberRange(min=0, min_open=True, max=MAX_TIMEOUT_S),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Seconds that a request may take with all its attempts.",
)
@click.option("--retry-failed", is_flag=True, help="Take failed lines out of OUT, and redo them.")
@click.option(
    "--progress/--no-progress",
    default=None,
    help="A progress bar on standard error. Default: where that is a terminal.",
)
@json_option("Write a summary here; - is standard output, and then only JSON.")
def command(
    source: str,
    target: Path,
    words: tuple[str, ...],
    base_url: str | None,
    api_key: str | None,
    model: str | None,
    max_concurrency: int,
    max_retries: int,
    request_timeout_s: float,
    retry_failed: bool,
    progress: bool | None,
    json_path: str | None,
) -> None:
    """Answer the requests of the file IN (- for standard input) into the file OUT.

    Both are JSON lines in the format of OpenAI's batch API. The server is one that runs
    (--base-url), or one that is started for the batch and ends with it; what stands after -- is
    passed on to `tinfer serve`.
    """
    if base_url is not None and (words or model is not None):
        raise click.UsageError("a server that runs (--base-url) takes no --model and no options")
    if base_url is None and _is_typed("api_key"):
        raise click.UsageError("--api-key goes with --base-url; a server of its own has its own")
    if words and not words[0].startswith("-"):
        raise click.UsageError(f"one file in and one out; {words[0]!r} is too much")
    from tinfer.client import TinferClientError
    from tinfer.client.connection import UNIX, server_url

    if base_url is not None and not base_url.startswith(UNIX):
        checked("--base-url", server_url, base_url)

    def answered() -> int:
        check_writable(json_path, None)
        serve_words = _serve_words(model, words)
        from tinfer.batch.app import BatchOptions, run

        return run(
            BatchOptions(
                input=source,
                output=target,
                base_url=base_url,
                api_key=api_key or None,
                serve_words=serve_words,
                max_concurrency=max_concurrency,
                max_retries=max_retries,
                request_timeout_s=request_timeout_s,
                retry_failed=retry_failed,
                json_path=json_path,
                show_progress=sys.stderr.isatty() if progress is None else progress,
            )
        )

    sys.exit(ended(answered, TinferClientError))


def _is_typed(name: str) -> bool:
    """Whether an option was given on the command line, and not by the environment."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def _serve_words(model: str | None, words: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments of `tinfer serve`, looked through before anything starts.

    Raises `click.UsageError` and `StartError` for what it would not take, and for options that say
    who else may ask the server, or where.
    """
    context = serve.command.make_context("tinfer batch IN OUT --", [*words])
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if "model" in given:
        raise click.UsageError(f"the model of a batch goes before --, as --model {given['model']}")
    for name in given:
        if name in configuration.ACCESS or name in ("dry_run", "json_path", "print_config"):
            flag = "--" + name.removesuffix("_path").replace("_", "-")
            raise click.UsageError(f"{flag} is of no use to the server of a batch")
    configuration.load(given)
    return (*(() if model is None else (model,)), *words)
