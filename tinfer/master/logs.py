"""What the master's log looks like, on standard error: lines for people, or JSON for machines.

What a record has beside its message (`extra=`) is shown in both: as `name=value`, or as members.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import msgspec

from tinfer.config import ServeConfig

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_BARE = re.compile(r"[\w.:/+-]+")


def set_up(config: ServeConfig) -> None:
    """Replaces what the process logs to. Of other packages only warnings are of interest."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter(TEXT))
    level = getattr(logging, config.log_level.upper())
    if config.verbose:
        level = min(level, logging.INFO)
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("tinfer").setLevel(level)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was logged beside the message."""
    return {name: value for name, value in record.__dict__.items() if name not in _OWN}


class TextFormatter(logging.Formatter):
    """One line, then a traceback where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown = [f"{name}={_text(value)}" for name, value in fields_of(record).items()]
        return " ".join([super().formatMessage(record), *shown])


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time` in UTC, `level`, `logger`, `message`, what else was logged,
    and `error` with a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _text(value: object) -> str:
    """Without spaces or line ends, whatever a client has sent."""
    text = str(value)
    return text if _BARE.fullmatch(text) else msgspec.json.encode(value, enc_hook=str).decode()
