"""How a command ends: its exit code, and one line on standard error for what cannot be done."""

from __future__ import annotations

from collections.abc import Callable

import click

from tinfer.errors import StartError

EXIT_CANNOT_START = 2
EXIT_INTERRUPTED = 130


def ended(run: Callable[[], int], *also: type[Exception]) -> int:
    """The exit code of `run`: its own, or the one of the error that ended it.

    `also` are the classes of errors, beside `StartError` and `OSError`, that are told in one line.
    """
    told: tuple[type[Exception], ...] = (StartError, *also)
    try:
        return run()
    except told as error:
        click.echo(f"tinfer: {error}", err=True)
    except OSError as error:
        what = error.strerror or str(error)
        click.echo(f"tinfer: {error.filename or 'cannot write'}: {what}", err=True)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_CANNOT_START
