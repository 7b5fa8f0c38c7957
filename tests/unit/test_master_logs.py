"""What the master's log looks like, for people and for machines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tinfer.config import load
from tinfer.master import logs

OURS = logging.getLogger("tinfer")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    levels, handlers = (root.level, OURS.level), list(root.handlers)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    OURS.setLevel(levels[1])


def written(capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """What is written of a few records."""
    # The handlers of pytest would be closed.
    logging.getLogger().handlers.clear()
    logs.set_up(load({"engine": "fake", **options}))
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("tinfer.test"), level)("a %s", level)
    logging.getLogger("other").info("of another package")
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, "warning"),
        ({"log_level": "debug"}, "debug"),
        ({"log_level": "error"}, "error"),
        ({"verbose": True}, "info"),
        ({"verbose": True, "log_level": "debug"}, "debug"),
        ({"verbose": True, "log_level": "error"}, "info"),
    ],
)
def test_the_level_is_the_one_asked_for(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any], first: str
) -> None:
    levels = ["debug", "info", "warning", "error"]
    shown = [one.split()[-1] for one in written(capsys, **options).splitlines()]
    assert shown == levels[levels.index(first) :]


def record(message: str, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("tinfer.test", logging.INFO, __file__, 1, message, (), None)
    made.__dict__.update(fields)
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_text_shows_what_was_logged_beside_the_message() -> None:
    shown = logs.TextFormatter(logs.TEXT).format(
        record("done", route="whole", ttft_s=0.5, finish_reason=["stop", None], id="a b\nINFO lie")
    )
    assert shown.endswith(
        'INFO tinfer.test done route=whole ttft_s=0.5 finish_reason=["stop",null] '
        'id="a b\\nINFO lie"'
    )
    assert "\n" not in shown


def test_json_is_one_object_per_line() -> None:
    shown = logs.JsonFormatter().format(record("a\nb", route="whole", kind=logging))
    assert "\n" not in shown
    assert json.loads(shown) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "INFO",
        "logger": "tinfer.test",
        "message": "a\nb",
        "route": "whole",
        "kind": str(logging),
    }


@pytest.mark.parametrize("formatter", [logs.TextFormatter(logs.TEXT), logs.JsonFormatter()])
def test_a_traceback_is_there(formatter: logging.Formatter) -> None:
    made = record("broke", error_id="7")
    try:
        raise OSError("disk")
    except OSError:
        made.exc_info = sys.exc_info()
    shown = formatter.format(made)
    assert "OSError: disk" in shown and "7" in shown
    assert len(shown.splitlines()) == 1 or isinstance(formatter, logs.TextFormatter)
